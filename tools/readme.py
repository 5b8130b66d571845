"README.md from nbs/index.ipynb"
import json, re
from pathlib import Path

from nb2md import convert

root = Path(__file__).resolve().parent.parent

def doc_url(): return re.search(r'^Documentation = "(.*?)/?"$', (root/'pyproject.toml').read_text(encoding='utf-8'), re.M)[1]

def readme(): return convert(json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8')), site=False, doc_url=doc_url())[0]

def write(): (root/'README.md').write_text(readme(), encoding='utf-8')

if __name__ == '__main__': write()
