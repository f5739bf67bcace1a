"""Graphs in CSV files: what is read, and the one clear error for what cannot be."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist.errors import DataError
from gist.graph.data import GraphData

EDGES = "source,target\na,b\nb,c\nc,d\n"
FEATURES = "node,f0,f1\na,0,1\nb,2,3\nc,4,5\nd,6,7\n"
LABELS = "node,label,split\na,0,train\nb,1,train\nc,2,val\nd,0,test\n"


def read(folder: Path, edges=EDGES, features=FEATURES, labels=LABELS, **options) -> GraphData:
    """A path of four nodes, changed as asked."""
    texts = {"edges": edges, "features": features, "labels": labels}
    for name, text in texts.items():
        (folder / f"{name}.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    files = [folder / f"{name}.csv" for name in texts]
    return GraphData.from_csv(*files, **{"symmetrize": True, **options})


def test_a_graph_in_three_files(tmp_path):
    data = read(tmp_path)
    assert data.edge_index.tolist() == [[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]]
    assert data.x.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert data.y.tolist() == [0, 1, 2, 0]
    masks = [data.mask(split).tolist() for split in ("train", "val", "test")]
    assert masks == [[True, True, False, False], [False, False, True, False], [False] * 3 + [True]]
    assert (data.edge_weight, data.name) == (None, "graph")


def test_without_headers_compressed_or_with_windows_ends_it_is_the_same(tmp_path):
    expected = read(tmp_path).fingerprint()
    bare = [text.partition("\n")[2] for text in (EDGES, FEATURES, LABELS)]
    assert read(tmp_path, *bare, header=False).fingerprint() == expected
    ended = [text.replace("\n", "\r\n") for text in (EDGES, FEATURES, LABELS)]
    assert read(tmp_path, *ended).fingerprint() == expected
    spaced = ["\ufeff" + text.replace(",", ", ") + "\n\n" for text in (EDGES, FEATURES, LABELS)]
    assert read(tmp_path, *spaced).fingerprint() == expected
    zipped = []
    for name, text in {"edges": EDGES, "features": FEATURES, "labels": LABELS}.items():
        zipped.append(tmp_path / f"{name}.csv.gz")
        zipped[-1].write_bytes(gzip.compress(text.encode()))
    assert GraphData.from_csv(*zipped, symmetrize=True).fingerprint() == expected


def test_nodes_without_names_have_the_numbers_of_their_rows(tmp_path):
    edges, features = "s,t\n0,1\n1,2\n2,3\n", "f0,f1\n0,1\n2,3\n4,5\n6,7\n"
    labels = "n,l,s\n0,0,train\n1,1,train\n2,2,val\n3,0,test\n"
    data = read(tmp_path, edges, features, labels, node_ids=False)
    assert data.fingerprint() == read(tmp_path).fingerprint()


@pytest.mark.parametrize("first", [0, 1])
def test_columns_may_be_named_by_their_numbers(first, tmp_path):
    names, expected = f"{first},{first + 1}\n", read(tmp_path).fingerprint()
    features = FEATURES.replace("f0,f1\n", names)
    assert read(tmp_path, features=features).fingerprint() == expected
    features = f"{names}0,1\n2,3\n4,5\n6,7\n"
    edges, labels = "s,t\n0,1\n1,2\n2,3\n", "n,l,s\n0,0,train\n1,1,train\n2,2,val\n3,0,test\n"
    assert read(tmp_path, edges, features, labels, node_ids=False).fingerprint() == expected


def test_valid_is_another_word_for_val(tmp_path):
    labels = LABELS.replace("val\n", "valid\n")
    assert read(tmp_path, labels=labels).fingerprint() == read(tmp_path).fingerprint()


@pytest.mark.parametrize(("delimiter", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_delimiters_are_named(tmp_path, delimiter, name):
    other = FEATURES.replace(",", delimiter)
    with pytest.raises(DataError, match=rf"features\.csv seems to be separated by {name}"):
        read(tmp_path, features=other)


def test_splits_as_arguments_and_nodes_without_labels(tmp_path):
    labels = "node,label\na,0\nc,\nb,1\n"
    edges = "s,t\n7,b\n"
    features = "n,f\na,1\nb,2\n7,3\nc,4\nd,5\n"
    splits = {"train": ["a"], "val": ["b"], "test": [7]}
    data = read(tmp_path, edges, features, labels + "7,1\n", **splits)
    assert data.y.tolist() == [0, 1, 1, -1, -1]
    assert data.test_mask.tolist() == [False, False, True, False, False]


def test_splits_as_arguments_go_before_the_file(tmp_path):
    data = read(tmp_path, train=["a"])
    assert data.train_mask.tolist() == [True, False, False, False]
    assert data.val_mask.tolist() == [False, False, True, False]


def test_weights_and_duplicates(tmp_path):
    edges = "s,t,w\na,b,0.5\nb,a,0.5\na,b,0.5\nb,a,0.5\n"
    data = read(tmp_path, edges=edges, keep_duplicates=True)
    assert data.edge_weight.tolist() == [0.5] * 4
    assert data.edge_index.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]


def test_names_of_classes_are_numbered_in_order(tmp_path):
    labels = "node,label,split\na,pear,train\nb,fig,train\nc,pear,val\nd,apple,test\n"
    data = read(tmp_path, labels=labels)
    assert (data.y.tolist(), data.num_classes) == ([2, 1, 2, 0], 3)


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4),
    form=st.sampled_from([repr, "{:.9g}".format]),
)
def test_numbers_come_back_as_they_were(values, form, tmp_path_factory):
    x = [values] * 4
    rows = [f"{name}," + ",".join(map(form, row)) for name, row in zip("abcd", x, strict=True)]
    features = "\n".join(["node" + ",f" * len(values), *rows])
    data = read(tmp_path_factory.mktemp("csv"), features=features)
    assert torch.equal(data.x, torch.tensor(x, dtype=torch.float32))


BAD_EDGES = {
    "s\na\n": r"lacks a column or has one too many; got: 1: s; expected: source, target and at",
    "a,b,c,d\n": r"lacks a column or has one too many; got: 4: a, b, c, d",
    "": r"is empty; expected: source, target",
    "s,t\na,b\nb,c,d\n": r"line 3: more or fewer cells than before; got: 3; expected: 2",
    EDGES + "a,e\n": r"line 5 names a node that is not known; got: 'e'",
    EDGES
    + "a,b\n": r"lists an edge more than once; got: 1 such lines, among them line 5, which is "
    "line 2 again.*keep_duplicates",
    "s,t,w\na,b,heavy\n": r"line 2: a cell is not a finite number; got: 'heavy'",
    "a,b\nb,c\n": r"line 1: the first line is not a header.*got: a, b; .*remedy: pass header=False",
    "a,z,0.5\nb,c,0.5\n": r"line 1: the first line is not a header",
    's,t\na,b\n"a,b\n': r"cannot be read after line 2; got: unexpected end",
    EDGES.encode("utf-16"): r"cannot be read; got: 'utf-8' codec",
}
BAD_FEATURES = {
    "n\na\n": r"lacks a column",
    "n,f\n": r"has no nodes; got: a header alone",
    "n,f,g\na,0,1\nb,2\n": r"line 3: more or fewer cells than before; got: 2; expected: 3",
    "n,f\na,\n": r"line 2: a cell is not a finite number; got: ''",
    "n,f\na,1\n\nb,nan\n": r"line 4: a cell is not a finite number; got: 'nan'",
    "n,f\na,1e999\n": r"line 2: a cell is not a finite number; got: '1e999'",
    "n,f\n,1\n": r"line 2: the node has no name",
    "a,0.5,1\nb,2,3\n": r"line 1: the first line is not a header.*got: a, 0\.5, 1; .*header=False",
    FEATURES + "a,8,9\n": r"line 6: a node has two lines; got: 'a', also on line 2",
}
BAD_LABELS = {
    "n\na\n": r"lacks a column",
    "\n\n": r"is empty",
    "n,l\na,0\nb,1\n": r"does not say which nodes are in which split.*give .*train=, val=, test=",
    "n,l,s\nz,0,train\n": r"line 2 names a node that is not known; got: 'z'",
    LABELS + "b,1,\n": r"line 6: a node has two lines; got: 'b', also on line 3",
    "a,0,train\n": r"line 1: the first line is not a header",
    "z,tea,train\n": r"line 1: the first line is not a header",
    "z,3\n": r"line 1: the first line is not a header",
    "n,l,s\na,0,train\nb,0.5,val\n": r"line 3: the label is not a class; got: 0\.5",
    "n,l,s\na,0,train\nb,nan,val\n": r"line 3: the label is not a class; got: nan",
    "n,l,s\na,1e300,train\n": r"line 2: the label is not a class; got: 1e300",
    "n,l,s\na,0,train\nb,99999999999999999999,val\n": r"line 3: the label is not a class; got: 9",
    "n,l,s\na,fig,train\nb,1,val\n": r"line 2: the label is not a class; got: fig",
    "n,l,s\na,0,dev\n": r"line 2: unknown split; got: dev; expected: train, val, test or noth",
    "n,l,s\na,,val\n": r"line 2: the label of a node in a split is missing",
    b"n,l,s\na,\xff,val\n": r"cannot be read after line 1; got: 'utf-8' codec",
}
BAD = [
    (name, match, text)
    for name, cases in (("edges", BAD_EDGES), ("features", BAD_FEATURES), ("labels", BAD_LABELS))
    for text, match in cases.items()
]


@pytest.mark.parametrize(("name", "match", "text"), BAD)
def test_files_that_are_refused(name, match, text, tmp_path):
    with pytest.raises(DataError, match=rf"{name}\.csv,? {match}"):
        read(tmp_path, **{name: text})


def test_arguments_that_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"the val split names a node that is not known; got: 'z'"):
        read(tmp_path, val=["z"])
    with pytest.raises(DataError, match="the test split is empty"):
        read(tmp_path, test=[])
    with pytest.raises(DataError, match=r"edges\.csv, line 1 names a node.*got: 'source'.*header"):
        read(tmp_path, features=FEATURES.partition("\n")[2], header=False)


def test_files_that_are_cut_off_or_not_there(tmp_path):
    read(tmp_path)
    files = [tmp_path / f"{name}.csv" for name in ("edges", "features", "labels")]
    with pytest.raises(DataError, match=r"none\.csv cannot be read; got: .*No such file"):
        GraphData.from_csv(tmp_path / "none.csv", *files[1:])
    zipped = tmp_path / "features.csv.gz"
    content = gzip.compress(FEATURES.encode())
    for broken in (content[:-4], content[:8], FEATURES.encode(), b""):
        zipped.write_bytes(broken)
        with pytest.raises(DataError, match=r"features\.csv\.gz (cannot be read|is empty)"):
            GraphData.from_csv(files[0], zipped, files[2])
