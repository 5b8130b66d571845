"Package metadata from settings.ini, the version from fastai_bn/__init__.py. pyproject.toml says what nbdev reads."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_path']
version = re.search(r'^__version__\s*=\s*["\']([^"\']+)', (root/lib/'__init__.py').read_text(encoding='utf-8'), re.M)[1]
status = 'Planning|Pre-Alpha|Alpha|Beta|Production/Stable|Mature|Inactive'.split('|')[int(cfg['status'])-1]

setup(
    version=version,
    description=cfg['description'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license=cfg['license'],
    keywords=cfg['keywords'].split(),
    classifiers=[f'Development Status :: {cfg["status"]} - {status}', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=[lib, f'{lib}.*']),
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require={o: cfg[f'{o}_requirements'].split() for o in ('dist','loops','dev','doc','bench')},
    entry_points={'nbdev': [f'{lib} = {lib}._modidx:d']},
)
