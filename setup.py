"""Install hapolicy_gevent.py and the command `hapolicy`; with HAPOLICY_USE_MYPYC=1, compiled to machine code."""

import ast
import os
import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
SOURCE = (HERE / 'hapolicy_gevent.py').read_text()
VERSION = re.search(r"^__version__ = '(.+)'$", SOURCE, re.MULTILINE)
assert VERSION
COMPILERS = ['mypy', 'types-docopt', 'types-gevent'] if os.environ.get('HAPOLICY_USE_MYPYC') == '1' else []
extensions = []
if COMPILERS:
    try:
        from mypyc.build import mypycify
    except ImportError:  # pip asks first what is needed, and brings it by setup_requires
        pass
    else:
        copy = HERE / 'build' / 'hapolicy_gevent.py'  # mypyc leaves a docstring out, and docopt needs it
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(f'{SOURCE}\n__doc__ = {ast.get_docstring(ast.parse(SOURCE), clean=False)!r}\n')
        extensions = mypycify(['--ignore-missing-imports', str(copy)])

setup(
    name='hapolicy-gevent',
    version=VERSION[1],
    description='A proxy between Postfix and its policy servers: a dead, hung or misbehaving one never costs a mail',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='BSD-2-Clause',
    py_modules=['hapolicy_gevent'],
    ext_modules=extensions,
    data_files=[('share/man/man1', ['contrib/hapolicy.1'])],
    python_requires='>=3.10',
    setup_requires=COMPILERS,
    install_requires=['gevent>=22.10', 'docopt>=0.6.2'],
    extras_require={
        'metrics': ['prometheus-client>=0.16'],
        'test': [  # pytest-xdist 3.8 groups no tests (--dist loadgroup) under pytest 9.2
            'hypothesis', 'mypy', 'prometheus-client', 'pytest<9.2', 'pytest-xdist', 'ruff', 'selenium',
            'setuptools>=70.1', 'types-docopt', 'types-gevent', 'types-setuptools',
        ],
        'bench': ['matplotlib'],
    },
    entry_points={'console_scripts': ['hapolicy=hapolicy_gevent:main']},
)
