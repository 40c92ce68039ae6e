# ruff: noqa: E501
"""Attacks on the machine: time, memory, processes, output, disk, containment, the next sample; and gamed tests."""

from tests.rewards.sandbox.cases import OPEN, SUM_LINE, attacks

_QUICK = {"timeout_s": 0.5}

TIME = attacks(
    "time",
    {
        "endless loop while loading": "while True:\n    pass",
        "sleep": "import time\ndef add(a, b):\n    time.sleep(1000)",
        "the interpreter lock is held": "def add(a, b):\n    return 9**9**9",
        "regular expression": "import re\ndef add(a, b):\n    return re.match(r'(a+)+$', 'a' * 60 + 'b')",
        "all signals ignored": "import signal\nfor n in range(1, 65):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
    },
    options=_QUICK,
) + attacks(
    "time",
    {
        "a thread that does not end": "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()"
    },
    {"tests": [{"input": "", "output": ""}]},
    options=_QUICK,
)

MEMORY = attacks(
    "memory",
    {
        "10 GiB at once": "def add(a, b):\n    return len(bytearray(10 << 30))",
        "growing list": "def add(a, b):\n    x = [0]\n    while True:\n        x += x",
        "anonymous map": "import mmap\ndef add(a, b):\n    m = mmap.mmap(-1, 10 << 30)\n    return a + b",
        "endless recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b):\n    return add(a, b)",
        "doubling text": "def add(a, b):\n    s = 'x'\n    while True:\n        s += s",
    },
    slow=["growing list", "doubling text", "endless recursion"],
)

PROCESSES = attacks(
    "processes",
    {
        "fork": "import os\nif os.fork() == 0:\n    os._exit(0)\nprint('open')",
        "subprocess": "import subprocess\nsubprocess.run(['/usr/bin/true'])\nprint('open')",
        "multiprocessing": "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print)\n"
        "p.start()\np.join()\nprint('open')",
        "many threads": "import threading, time\nfor _ in range(2000):\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('open')",
    },
    OPEN,
)
PROCESSES += attacks(
    "processes",
    {
        "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "sleeping children": "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        time.sleep(600)\n"
        "while True:\n    time.sleep(1)",
        "10 GiB over children": "import os, time\nfor _ in range(26):\n    if os.fork() == 0:\n"
        "        kept = b'x' * (400 << 20)\n        time.sleep(600)\ntime.sleep(600)",
        "children of children that hold memory": "import os, time\nfor _ in range(4):\n    os.fork()\n"
        "kept = b'x' * (300 << 20)\ntime.sleep(600)",
        "daemon": "import os, time\nif os.fork() == 0:\n    try:\n        os.setsid()\n    except OSError:\n        pass\n"
        "    if os.fork() == 0:\n        time.sleep(600)\n    os._exit(0)",
    },
    OPEN,
    options={"timeout_s": 0.5, "allow_subprocess": True},
)

PROCESSES += attacks(
    "processes",
    {
        "more memory than allowed, in children": "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n"
        "        kept = b'x' * (80 << 20)\n        time.sleep(600)\ntime.sleep(2)\nprint('open', flush=True)\nos._exit(0)",
    },
    OPEN,
    options={"allow_subprocess": True, "memory_mib": 128},
)

OUTPUT = attacks(
    "output",
    {
        "endless output": "while True:\n    print('5' * 1000)",
        "endless errors": "import sys\nwhile True:\n    sys.stderr.write('5' * 1000)",
        "one line of 100 MB": "print('5' * 10**8)",
    },
    SUM_LINE,
)
_FILL = "for i in range(100):\n    with open(f'{folder}/part{i}', 'wb') as f:\n        f.write(bytes(8 << 20))\nprint('open')"
DISK = attacks(
    "disk",
    {
        "fill the scratch folder": f"folder = '.'\n{_FILL}",
        "fill shared memory": f"folder = '/dev/shm'\n{_FILL}",
    },
    OPEN,
    may_pass_without="disk",
) + attacks(
    "disk",
    {
        "one file of 1 GiB": "with open('big', 'wb') as f:\n    for _ in range(128):\n        f.write(bytes(8 << 20))\n"
        "print('open')",
        "sparse file": "with open('big', 'wb') as f:\n    f.truncate(1 << 40)\nprint('open')",
    },
    OPEN,
)

CONTAINMENT = attacks(
    "containment",
    {
        "tcp": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)\nprint('open')",
        "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))\n"
        "print('open')",
        "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nprint('open')",
        "read /etc/passwd": "open('/etc/passwd').read()\nprint('open')",
        "list home folders": "import os\nassert os.listdir('/root') + os.listdir('/home')\n"
        "assert set(os.listdir('/root')) - {'.pyenv'}\nprint('open')",
        "write a system file": "open('/usr/lib/python3/x.py', 'w').write('')\nprint('open')",
        "write its own interpreter": "import os\nopen(os.__file__, 'a').write('')\nprint('open')",
        "secrets in the environment": "import os\nassert set(os.environ) - {'PATH', 'HOME', 'LANG', 'PWD', 'TMPDIR', "
        "'LC_CTYPE'}\nprint('open')",
        "host processes": "import os\nassert any(open(f'/proc/{p}/cmdline').read() for p in os.listdir('/proc') "
        "if p.isdigit())\nprint('open')",
        "kill everyone": "import os\nos.kill(-1, 9)\nos.kill(os.getppid() or 1 // 0, 9)\nprint('open')",
        "become root": "import os\nassert os.getuid()\nos.setuid(0)\nprint('open')",
        "own namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\nprint('open')",
        "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, b'') == 0\nprint('open')",
        "chroot": "import os\nos.mkdir('d')\nos.chroot('d')\nprint('open')",
        "ptrace": "import ctypes\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0\nprint('open')",
        "device node": "import os, stat\nos.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(254, 0))\nprint('open')",
        "program with set-user-id": "import os, stat\nassert any(os.stat(f'/usr/bin/{n}').st_mode & stat.S_ISUID "
        "for n in ('su', 'mount'))\nos.execv('/usr/bin/su', ['su', '-c', 'echo open'])",
        "kernel keyring": "import ctypes\nassert ctypes.CDLL(None).syscall(250, 0, -3, 0) >= 0\nprint('open')",
        "raise its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nprint('open')",
    },
    OPEN,
)

GAMING = attacks(
    "gaming visible tests",
    {
        "answers by heart": "def add(a, b):\n    return {(2, 3): 5, (-1, 1): 0}.get((a, b))",
        "answers by order": "answers = [5, 0]\ndef add(a, b):\n    return answers.pop(0)",
        "a constant": "def add(a, b):\n    return 5",
    },
    {
        "entry_point": "add",
        "tests": [{"args": [2, 3], "expected": 5}, {"args": [-1, 1], "expected": 0}],
        "hidden_tests": [{"args": [40, 2], "expected": 42}],
    },
) + attacks(
    "gaming visible tests",
    {"prints the visible output": "print(5)", "guesses by input": "print({'2 3': 5}.get(input(), 0))"},
    {"tests": [{"input": "2 3\n", "output": "5\n"}], "hidden_tests": [{"input": "20 22\n", "output": "42\n"}]},
)

CASES = TIME + MEMORY + PROCESSES + OUTPUT + DISK + CONTAINMENT + GAMING

# Each pair: a program that tries to spoil what comes after it, then one that is only right if it succeeded.
POISONING = [
    ("open('/tmp/marker', 'w').write('x')\nprint('x')", "open('/tmp/marker').read()\nprint('open')"),
    ("open('marker', 'w').write('x')\nprint('x')", "open('marker').read()\nprint('open')"),
    (
        "import builtins, json, sys\nbuiltins.POISON = json.POISON = sys.POISON = 1\nprint('x')",
        "import builtins, json, sys\nassert any(hasattr(m, 'POISON') for m in (builtins, json, sys))\nprint('open')",
    ),
    (
        "import random\nrandom.seed(0)\nprint('x')",
        "import random\nassert random.random() == 0.8444218515250481\nprint('open')",
    ),
    (
        "import os\nopen(os.path.dirname(os.__file__) + '/poison.py', 'w').write('')\nprint('x')",
        "import poison\nprint('open')",
    ),
    ("import os\nos.environ['POISON'] = '1'\nprint('x')", "import os\nassert 'POISON' in os.environ\nprint('open')"),
    ("import os\nos.umask(0)\nos.nice(10)\nprint('x')", "import os\nassert os.umask(0) == 0\nprint('open')"),
]
