"""The raw files of published data sets, written here line by line as they are published."""

import gzip
import json

import pytest

from cafe.data.prepare import prepare
from cafe.data.raw import FORMATS

pytestmark = pytest.mark.filterwarnings("ignore:no items file", "ignore:.* without an intent", "ignore:no user has 3")

REVIEWS_2014 = """\
{"reviewerID": "A2", "asin": "B01", "reviewerName": "\\"{'asin': 'B09'}\\"", "helpful": [0], "overall": 5.0, "unixReviewTime": 1390003200}
{"reviewerID": "A1", "asin": "B02", "reviewText": "\\u00fc, {\\"asin\\": 1}", "overall": 3.0, "summary": "", "unixReviewTime": 1390003200}
{"reviewerID": "A1", "asin": "0301", "overall": 4.0, "unixReviewTime": 1290003200, "reviewTime": "11 17, 2010"}
{"reviewerID": "A2", "asin": "0301", "overall": 4.0, "unixReviewTime": 1390003200, "reviewTime": "01 18, 2014"}
"""
META_2014 = """\
{'asin': '0301', 'description': "It's a \\'brush\\'", 'categories': [['Beauty', 'Tools', 'Brushes'], ['Beauty', 'Gifts']], 'price': 1.5}
{'asin': 'B01', 'title': 'x \\d', 'categories': [['Beauty', 'Makeup', 'Lips', 'Lipstick']]}
{'asin': 'B02', 'salesRank': {'Beauty': 7}, 'categories': [['Beauty']]}
"""
REVIEWS_2018 = """\
{"overall": 5.0,"vote": "2","verified": true, "reviewerID": "A2", "asin": "B01", "style": {"Color:": " Red"}, "unixReviewTime": 1514764800}
{"overall": 2.0, "verified": false, "reviewerID": "A2", "asin": "B02", "unixReviewTime": 1514851200, "image": ["u"]}
{"overall": 5.0, "verified": true, "reviewerID": "A1", "asin": "B02", "unixReviewTime": 1514764800}
"""
META_2018 = """\
{"category": ["Clothing", "Men", "Watches", "</span></span></span>", "Imported", "Steel"], "tech1": "", "title": "w", "asin": "B01"}
{"category": [], "title": "", "asin": "B02", "also_buy": ["B01"]}
"""
TMALL = """\
user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type
328862,323294,833,2882,2661.0,0829,0
328862,844400,1271,2882,2661.0,0829,2
234512,323294,833,97,,1111,0
234512,323294,833,97,,0511,3
328862,323294,833,97,1.0,1111,2
"""
IJCAI16 = "use_ID,sel_ID,ite_ID,cat_ID,act_ID,time\n1,10,100,1,0,20150801\n1,9,101,1,1,20150702\n2,9,100,1,0,20151130\n"
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\tb\t5\t9.0\n7\ta\t4\t8.5\n10\tb\t1\t1e9\n"
ITEM = (
    'item_id:token\ttitle:token_seq\tcategories:token_seq\tbrand:token\n'
    'a\t"An odd title\tBeauty Hair Combs\tacme\nb\tTea 5" cup\tGrocery\t\n'
)  # fmt: skip


def write(folder, name, text):
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder / name


def histories(dataset):
    return {
        user: dataset.item_ids.gather(dataset.sequences[number]).to_list()
        for number, user in enumerate(dataset.user_ids.to_list())
    }


def intents(dataset):
    return dict(zip(dataset.item_ids.to_list(), dataset.intent_ids.gather(dataset.item_intent).to_list(), strict=True))


@pytest.mark.parametrize("end", ["", ".gz"])
def test_amazon_2014(tmp_path, end):
    """Metadata are Python literals; an item's first path counts; reviews of one second keep the order of the file."""
    files = write(tmp_path, f"r.json{end}", REVIEWS_2014), write(tmp_path, f"m.json{end}", META_2014)
    made = prepare(*files, format="amazon")
    assert histories(made) == {"A1": ["0301", "B02"], "A2": ["B01", "0301"]}
    assert intents(made) == {
        "0301": "Beauty > Tools > Brushes",
        "B01": "Beauty > Makeup > Lips > Lipstick",
        "B02": "Beauty",
    }


@pytest.mark.parametrize("end", ["", ".gz"])
def test_amazon_2018(tmp_path, end):
    """Metadata are JSON; the page's markup ends the path; an empty path is no intent."""
    files = write(tmp_path, f"r.json{end}", REVIEWS_2018), write(tmp_path, f"m.json{end}", META_2018)
    made = prepare(*files, format="amazon")
    assert histories(made) == {"A1": ["B02"], "A2": ["B01", "B02"]}
    assert intents(made) == {"B01": "Clothing > Men > Watches", "B02": "unknown"}


@pytest.mark.parametrize(
    ("level", "brush", "lips"),
    [
        (1, "Beauty", "Beauty"),
        (2, "Beauty > Tools", "Beauty > Makeup"),
        (4, "Beauty > Tools > Brushes", "Beauty > Makeup > Lips > Lipstick"),
        (-2, "Beauty > Tools", "Beauty > Makeup > Lips"),
        (-9, "Beauty", "Beauty"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_levels_of_a_path(tmp_path, level, brush, lips, strict):
    """The same whether polars reads the file (strict JSON) or each line is parsed."""
    meta = META_2014
    if strict:
        meta = '{"asin": "0301", "categories": [["Beauty", "Tools", "Brushes"], ["Other"]]}\n' + (
            '{"asin": "B01", "categories": [["Beauty", "Makeup", "Lips", "Lipstick"]]}\n{"asin": "B02", "categories": [["Beauty"]]}\n'
        )
    made = prepare(
        write(tmp_path, "r.json", REVIEWS_2014), write(tmp_path, "m.json", meta), format="amazon", intent_level=level
    )
    assert intents(made) == {"0301": brush, "B01": lips, "B02": "Beauty"}


def test_one_list_of_categories_is_one_path(tmp_path):
    """As later files have it under the name of 2014."""
    meta = '{"asin": "B01", "categories": ["Beauty", "Lips"]}\n{"asin": "B02", "categories": []}\n{"asin": "0301"}\n'
    made = prepare(write(tmp_path, "r.json", REVIEWS_2014), write(tmp_path, "m.json", meta), format="amazon")
    assert intents(made) == {"0301": "unknown", "B01": "Beauty > Lips", "B02": "unknown"}


def test_odd_parts_of_a_path_are_read_by_line_as_polars_reads_them(tmp_path):
    """None is left out, and what is no text is written as in JSON."""
    review = write(tmp_path, "r.json", REVIEWS_2018)
    meta = {"category": ["A", None, "B", 1, True, 2.5, {"\u00fc": [1, None]}, None]}, {"category": [None]}
    rows = [row | {"asin": asin} for row, asin in zip(meta, ("B01", "B02"), strict=True)]
    for write_row in (lambda row: json.dumps(row, ensure_ascii=False), repr):
        items = write(tmp_path, "m.json", "".join(write_row(row) + "\n" for row in rows))
        made = prepare(review, items, format="amazon")
        assert intents(made) == {"B01": 'A > B > 1 > true > 2.5 > {"\u00fc": [1, null]}', "B02": "unknown"}


@pytest.mark.parametrize("key", ["category", "categories"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_column_may_begin_late(tmp_path, key, strict):
    rows = [{"asin": f"x{i}"} for i in range(1100)] + [{"asin": "B01", key: ["A", "B"]}]
    text = "".join((json.dumps if strict else repr)(row) + "\n" for row in rows)
    made = prepare(write(tmp_path, "r.json", REVIEWS_2018), write(tmp_path, "m.json", text), format="amazon")
    assert intents(made) == {"B01": "A > B", "B02": "unknown"}


def test_category_counts_where_there_is_also_categories(tmp_path):
    meta = '{"asin": "B01", "categories": [["A"]], "category": ["B"]}\n{"asin": "B02", "categories": [["A"]]}\n'
    made = prepare(write(tmp_path, "r.json", REVIEWS_2018), write(tmp_path, "m.json", meta), format="amazon")
    assert intents(made) == {"B01": "B", "B02": "unknown"}


def test_blank_lines_are_no_rows_where_each_line_is_parsed(tmp_path):
    meta = META_2014.replace("\n", "\n\n")
    made = prepare(write(tmp_path, "r.json", REVIEWS_2014), write(tmp_path, "m.json", meta), format="amazon")
    assert made.preparation["read"]["items"] == 3
    assert made.preparation["dropped"]["incomplete_item_rows"] == 0


@pytest.mark.parametrize(
    "line", ['{"reviewerID": "A3", "asin"', "[1, 2]", "__import__('os').abort()", '{"reviewerID": "A3"}']
)
@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_malformed_review_is_named_or_counted(tmp_path, line, end):
    path = write(tmp_path, f"r.json{end}", REVIEWS_2018 + line + "\n\n" + REVIEWS_2018)
    with pytest.raises(
        ValueError, match=r"row 4 of .*r\.json.*: no value, or the line is not a JSON object \(1 such row"
    ):
        prepare(path, format="amazon")
    made = prepare(path, format="amazon", drop_incomplete=True)
    assert made.preparation["dropped"]["incomplete_rows"] == 1
    assert made.preparation["read"]["interactions"] == 6
    twice = prepare(write(tmp_path, "twice.json", REVIEWS_2018 * 2), format="amazon")
    assert made.fingerprint == twice.fingerprint


def test_malformed_metadata_is_named_or_counted(tmp_path):
    files = write(tmp_path, "r.json", REVIEWS_2014), write(tmp_path, "m.json", META_2014 + "{'asin': open('x')}\n")
    with pytest.raises(ValueError, match=r"column 'asin', row 4 of .*m\.json: no value, or the line is not"):
        prepare(*files, format="amazon")
    made = prepare(*files, format="amazon", drop_incomplete=True)
    assert made.preparation["dropped"]["incomplete_item_rows"] == 1


def test_values_read_by_line_are_those_that_polars_reads(tmp_path):
    rows = [
        {"reviewerID": i, "asin": a, "unixReviewTime": t} for i, a, t in ((1, "x", 2.5), (10, "é\n", 2), ("2", "x", 1))
    ]
    text = "".join(json.dumps(row | {"ok": True, "n": None}) + "\n" for row in rows)
    kept = {"ok": ["true"]}
    fast = prepare(write(tmp_path, "a.json", text), format="amazon", keep=kept)
    slow = prepare(write(tmp_path, "b.json", text + "broken\n"), format="amazon", keep=kept, drop_incomplete=True)
    assert histories(fast) == histories(slow) == {1: ["x"], 2: ["x"], 10: ["é\n"]}


def test_no_columns_and_wrong_files(tmp_path):
    review, meta = write(tmp_path, "r.json", REVIEWS_2014), write(tmp_path, "m.json", META_2014)
    for arguments, message in [
        ((meta, review), r"m\.json: no column 'reviewerID'; its columns are asin, description"),
        ((review, review), r"r\.json: no column 'category'; its columns are reviewerID, asin"),
        ((write(tmp_path, "c.json", TMALL),), r"c\.json: cannot be read as JSON lines \(none of its first 1,000"),
        ((write(tmp_path, "e.json.gz", ""),), r"e\.json\.gz: cannot be read as JSON lines"),
        ((write(tmp_path, "e.json", ""),), r"e\.json: the file is empty"),
        ((write(tmp_path, "t.csv", TMALL),), r"t\.csv: expected a file that ends in \.json, "),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(*arguments, format="amazon")
    with pytest.raises(ValueError, match=r"i\.csv: no column 'user_id'; its columns are use_ID"):
        prepare(write(tmp_path, "i.csv", IJCAI16), format="tmall")
    with pytest.raises(ValueError, match=r"x\.inter: column 'user_id' of the header is not of the form name:type"):
        prepare(write(tmp_path, "x.inter", INTER.replace(":token", "")), format="recbole")
    with pytest.raises(ValueError, match=r"a\.item: no column 'user_id'; its columns are item_id, title"):
        prepare(write(tmp_path, "a.item", ITEM), format="recbole")
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(gzip.compress(REVIEWS_2014.encode())[:-20])
    with pytest.raises(ValueError, match=r"cut\.json\.gz: cannot be read as JSON lines"):
        prepare(cut, format="amazon")
    with pytest.raises(ValueError, match="expected one of table, amazon, tmall, ijcai16, recbole"):
        prepare(review, format="json")
    for wrong in ({"intent_level": 0}, {"seq_separator": ""}):
        with pytest.raises(ValueError, match="counts from 1"):
            prepare(review, format="amazon", **wrong)


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_tmall(tmp_path, name):
    """Days are MMDD: 0511 is before 0829; actions of one day keep the order of the file. Ids are numbers."""
    with pytest.warns(UserWarning, match="1 item listed with several intents: the most frequent one is kept"):
        made = prepare(write(tmp_path, name, TMALL), format="tmall")
    assert histories(made) == {234512: [323294, 323294], 328862: [323294, 844400, 323294]}
    assert intents(made) == {323294: 97, 844400: 2882}
    assert made.preparation["items"] is None


def test_only_actions_asked_for_count_and_name_the_seller(tmp_path):
    path = write(
        tmp_path, "log.csv", TMALL + "234512,844400,1,5,,1101,2\n234512,844400,1,2882,,1101,1\nx,1,1,1,1,0101,1\n"
    )
    with pytest.warns(UserWarning, match="1 item listed with several"):
        made = prepare(path, format="tmall", keep={"action_type": ["2"]})
    assert histories(made) == {234512: [844400], 328862: [844400, 323294]}
    assert intents(made) == {323294: 97, 844400: 5}  # one purchase of either seller: the smaller number
    assert made.preparation["dropped"]["unkept_rows"] == 5
    assert made.preparation["dropped"]["incomplete_rows"] == 0
    assert made.preparation["options"]["keep"] == {"action_type": ["2"]}
    with pytest.raises(ValueError, match="no column 'action'; its columns are user_id"):
        prepare(path, format="tmall", keep={"action": ["2"]})
    with pytest.raises(ValueError, match="0 users and 0 items are left"):
        prepare(path, format="tmall", keep={"action_type": ["7"]})


@pytest.mark.parametrize("order", [1, -1])
def test_the_seller_of_an_item_does_not_depend_on_the_order_of_rows(tmp_path, order):
    rows = [f"{user},5,1,{seller},1,0101,0\n" for user, seller in ((1, 10), (2, 9), (3, 10), (4, 9), (5, 100))]
    text = TMALL.split("\n")[0] + "\n" + "".join(rows[::order]) + "1,6,1,1,1,0101,0\n"
    with pytest.warns(UserWarning, match="several intents"):
        made = prepare(write(tmp_path, "log.csv", text), format="tmall")
    assert intents(made) == {5: 9, 6: 1}


def test_malformed_rows_of_a_log(tmp_path):
    for row, message in [
        (
            "5,x,1,1,1,0101,0",
            r"column 'item_id', row 6 of .*: no value, or not a whole number, or more fields than the header \(1 such row",
        ),
        ("5,1", r"column 'time_stamp', row 6 of .*: no value, or not a whole number"),
        ("5,1,1,1,1,11-11,0", r"column 'time_stamp', row 6 of"),
        ("5,1,1,1,1,0101,0,9", r"'user_id', row 6 of .*, or more fields than the header \(1 such"),
    ]:
        path = write(tmp_path, "log.csv", TMALL + row + "\n")
        with pytest.raises(ValueError, match=message):
            prepare(path, format="tmall")
        with pytest.warns(UserWarning, match="several intents"):
            made = prepare(path, format="tmall", drop_incomplete=True)
        assert made.preparation["dropped"]["incomplete_rows"] == 1
        assert list(histories(made)) == [234512, 328862]


def test_ijcai16(tmp_path):
    made = prepare(write(tmp_path, "log.csv", IJCAI16), format="ijcai16", intent_col="cat_ID")
    assert histories(made) == {1: [101, 100], 2: [100]}
    assert intents(made) == {100: 1, 101: 1}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_recbole(tmp_path, end, newline):
    """Quotes are characters; 8.5 and 1e9 are times; an id that is a number is one."""
    inter, item = (text.replace("\n", newline) for text in (INTER, ITEM))
    files = write(tmp_path, f"d.inter{end}", inter), write(tmp_path, f"d.item{end}", item)
    made = prepare(*files, format="recbole")
    assert histories(made) == {7: ["a", "b"], 10: ["b"]}
    assert intents(made) == {"a": "Beauty > Hair > Combs", "b": "Grocery"}
    options = [
        ({"intent_level": 2}, "Beauty > Hair", "Grocery"),
        ({"seq_separator": ", "}, "Beauty Hair Combs", "Grocery"),
        ({"intent_col": "brand"}, "acme", "unknown"),
        ({"intent_col": "title", "seq_separator": "|"}, '"An odd title', 'Tea 5" cup'),
    ]
    for option, a, b in options:
        assert intents(prepare(*files, format="recbole", **option)) == {"a": a, "b": b}


def test_recbole_separators_make_no_empty_parts(tmp_path):
    item = "item_id:token\tcategories:token_seq\na\t A  B \nb\t  \n"
    made = prepare(write(tmp_path, "d.inter", INTER), write(tmp_path, "d.item", item), format="recbole")
    assert intents(made) == {"a": "A > B", "b": "unknown"}


def test_recbole_names_may_hold_colons(tmp_path):
    item = "item_id:token\tshop:kind:token\na\tX\nb\tY\n"
    files = write(tmp_path, "d.inter", INTER), write(tmp_path, "d.item", item)
    assert intents(prepare(*files, format="recbole", intent_col="shop:kind")) == {"a": "X", "b": "Y"}


def test_recbole_rows_with_another_number_of_fields(tmp_path):
    files = write(tmp_path, "d.inter", INTER + "7\ta\t1\n"), write(tmp_path, "d.item", ITEM + "c\tx\ty\tz\tmore\n")
    with pytest.raises(ValueError, match=r"column 'timestamp', row 4 of .*d\.inter: no value"):
        prepare(files[0], format="recbole")
    write(tmp_path, "d.inter", INTER)
    with pytest.raises(
        ValueError, match=r"column 'item_id', row 3 of .*d\.item: no value, or more fields than the header"
    ):
        prepare(*files, format="recbole")
    made = prepare(*files, format="recbole", drop_incomplete=True)
    assert made.preparation["dropped"]["incomplete_item_rows"] == 1
    assert intents(made) == {"a": "Beauty > Hair > Combs", "b": "Grocery"}


def test_an_inter_that_names_the_intent_is_its_own_items_file(tmp_path):
    text = "user_id:token\tseller_id:token\titem_id:token\ttimestamp:float\n1\t007\tx\t1\n2\t8\tx\t1\n2\t8\ty\t1\n"
    path = write(tmp_path, "tmall.inter", text)
    with pytest.warns(UserWarning, match="1 item listed with several intents: the first one is kept"):
        made = prepare(path, path, format="recbole", intent_col="seller_id")
    assert intents(made) == {"x": "007", "y": "8"}


def test_the_same_shop_in_every_format(tmp_path):
    """One shop, five formats, with repeats and ties: the same histories, intents and counts."""
    rows = [(u, i, t) for u in (1, 2, 3, 12) for t, i in enumerate((u, 5, 5, 9, u + 1))]
    seller = {item: item % 2 for _, item, _ in rows}
    formats = {
        "table": ("a.csv", "user,item,timestamp\n", "{0},{1},{2}\n"),
        "amazon": ("a.json", "", '{{"reviewerID": {0}, "asin": {1}, "unixReviewTime": {2}}}\n'),
        "tmall": ("t.csv", TMALL.split("\n")[0] + "\n", "{0},{1},0,{3},,{2},0\n"),
        "ijcai16": ("i.csv", IJCAI16.split("\n")[0] + "\n", "{0},{3},{1},0,0,{2}\n"),
        "recbole": ("a.inter", "user_id:token\titem_id:token\ttimestamp:float\n", "{0}\t{1}\t{2}.0\n"),
    }
    items = {
        "table": write(tmp_path, "items.csv", "item,intent\n" + "".join(f"{i},{s}\n" for i, s in seller.items())),
        "amazon": write(tmp_path, "m.json", "".join(f"{{'asin': '{i}', 'categories': [['{s}']]}}\n" for i, s in seller.items())),
        "recbole": write(
            tmp_path, "a.item", "item_id:token\tcategories:token\n" + "".join(f"{i}\t{s}\n" for i, s in seller.items())
        ),
    }  # fmt: skip
    assert formats.keys() == FORMATS.keys()
    for filters in ({}, {"min_item_count": 2}, {"duplicates": "first", "min_sequence_length": 4}):
        made = {
            name: prepare(write(tmp_path, file, header + "".join(row.format(u, i, t, seller[i]) for u, i, t in rows)),
                          items.get(name), format=name, **filters)
            for name, (file, header, row) in formats.items()
        }  # fmt: skip
        assert len({dataset.fingerprint for dataset in made.values()}) == 1
