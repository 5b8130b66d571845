"README.md from nbs/index.ipynb, and the project's address, which stands in pyproject.toml alone"
import json
import re
from pathlib import Path

from nb2md import convert

root = Path(__file__).resolve().parent.parent

def read(name:str) -> str: return (root/name).read_text(encoding='utf-8')

def project_url(name:str) -> str:
    "Find an address of `[project.urls]`; '' if the project has none yet"
    found = re.search(rf'^{name} = "(.*?)/?"$', read('pyproject.toml'), re.M)
    return found[1] if found else ''

def doc_url() -> str:
    "Find the address of the site"
    return project_url('Documentation')

def readme() -> str:
    "Make README.md of the first page"
    return convert(json.loads(read('nbs/index.ipynb')), site=False, doc_url=doc_url())[0]

def write(): (root/'README.md').write_text(readme(), encoding='utf-8')

if __name__ == '__main__': write()
