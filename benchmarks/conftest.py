import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", help="folder with interactions.csv.gz and items.csv.gz, in place of shared/data/...")
