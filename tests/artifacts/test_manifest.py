import hashlib

from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree
from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.artifacts.manifest import folder_hash

names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\x00", exclude_categories=("Cs",)), min_size=1, max_size=5
)


@given(st.dictionaries(st.lists(names, min_size=1, max_size=3).map("/".join), st.binary(max_size=3), max_size=6))
def test_folder_hash_is_dvcs(contents: dict[str, bytes]):
    files = {relpath: hashlib.md5(content).hexdigest() for relpath, content in contents.items()}
    tree = Tree()
    for relpath, md5 in files.items():
        tree.add(tuple(relpath.split("/")), None, HashInfo("md5", md5))
    tree.digest()
    assert tree.hash_info.value == folder_hash(files)
