"README.md from nbs/index.ipynb"
import json
import re
from pathlib import Path

from nb2md import convert

root = Path(__file__).resolve().parent.parent

def read(name:str) -> str: return (root/name).read_text(encoding='utf-8')

def doc_url() -> str:
    "Find the address of the site"
    return re.search(r'^Documentation = "(.*?)/?"$', read('pyproject.toml'), re.M)[1]

def readme() -> str:
    "Make README.md of the first page"
    return convert(json.loads(read('nbs/index.ipynb')), site=False, doc_url=doc_url())[0]

def write(): (root/'README.md').write_text(readme(), encoding='utf-8')

if __name__ == '__main__': write()
