"Installation, read from settings.ini so that every name and version stands in one place."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    license='Apache-2.0', author=cfg['author'], author_email=cfg['author_email'], keywords=cfg['keywords'],
    python_requires='>='+cfg['min_python'], packages=find_packages(include=['dd3g', 'dd3g.*']),
    package_data={'dd3g': ['weights/*', 'assets/*']}, include_package_data=False, zip_safe=False,
    install_requires=cfg['requirements'].split(),
    extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev', 'cutout', 'study', 'exr', 'store', 'wandb')})
