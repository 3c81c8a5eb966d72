"""What a sandbox is for those who work in it as on any machine: accounts, arguments, cores, terminals, packages."""

import os
import pathlib
import select
import subprocess
import termios
import time
import unittest
import zipfile

from scratch import Scratch

# Values of TERM that people's terminals set by themselves.
TERMINALS = ("xterm-256color", "tmux-256color", "screen-256color", "xterm-kitty", "xterm-ghostty", "ghostty", "wezterm", "alacritty",
             "foot", "contour", "rio", "konsole-256color", "vte-256color", "st-256color", "iterm2", "mintty")


def setUpModule():
    global scratch
    scratch = Scratch()
    unittest.addModuleCleanup(scratch.remove)
    scratch.create("--name", "box")


def inside(*words, root=False, **how):
    return scratch.run("nagaya", "sandbox", "exec", "--quiet", *(["--privileged"] if root else []), "--session", "box", "--", *words, **how)


def shell(line, **how):
    return inside("sh", "-c", line, **how)


def upload(name, content):
    path = pathlib.Path(f"{scratch.home}/{name}")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    scratch.run("nagaya", "sandbox", "cp", str(path), f"box:/tmp/{name}")
    return f"/tmp/{name}"


class Commands(unittest.TestCase):
    def test_empty_arguments_are_arguments(self):
        self.assertEqual(inside("printf", "[%s]", "", "a", "").stdout, "[][a][]")
        shell("git init -q repository; git -C repository config user.email a@b; git -C repository config user.name a")
        inside("git", "-C", "repository", "commit", "-q", "--allow-empty", "--allow-empty-message", "-m", "")
        refused = inside("", "a", check=False)
        self.assertIn("invalid_command", refused.stderr)

    def test_commands_have_the_accounts_groups_and_home(self):
        shell("groupadd -g 2002 ops && usermod -aG ops tenki", root=True)
        self.assertIn("ops", inside("id", "-Gn").stdout.split())
        self.assertNotIn("ops", inside("id", "-Gn", root=True).stdout.split())
        self.assertEqual(shell("umask; cd; pwd; ulimit -Sc; ulimit -Hc").stdout, "0022\n/home/tenki\n0\nunlimited\n")

    @unittest.skipIf(pathlib.Path("/proc/sys/kernel/core_pattern").read_text().startswith(("/", "|")),
                     "this machine sends cores somewhere of its own")
    def test_cores_are_left_where_somebody_wants_them_and_stay_inside(self):
        crash = "cd /tmp && mkdir -p crash-$(id -u) && cd crash-$(id -u) && rm -f core* && {limit} sh -c 'kill -SEGV $$'; ls"
        for root in (False, True):
            self.assertEqual(shell(crash.format(limit=""), root=root, check=False).stdout, "")
            self.assertRegex(shell(crash.format(limit="ulimit -c unlimited;"), root=root, check=False).stdout, "^core")
            shell("ulimit -Hc 0 && ! ulimit -Hc 1 2>/dev/null", root=root)


class Terminals(unittest.TestCase):
    def test_todays_terminals_are_known(self):
        told = shell("for name in " + " ".join(TERMINALS) + "; do TERM=$name tput colors || echo $name; done").stdout
        self.assertEqual(told, "256\n" * len(TERMINALS))

    def test_backspace_takes_back_a_whole_character(self):
        ours, theirs = os.openpty()
        self.addCleanup(os.close, ours)
        self.addCleanup(os.close, theirs)
        termios.tcsetwinsize(theirs, (30, 90))
        # Everything of the line goes to the sandbox's terminal at once, which takes it apart.
        process = subprocess.Popen(
            ["nagaya", "sandbox", "exec", "--quiet", "-t", "--session", "box", "--", "sh", "-c", "echo up; read line; echo \"[$line]\""],
            env={**scratch.environment, "TERM": "xterm-kitty"}, stdin=theirs, stdout=theirs, stderr=theirs)
        self.read_until(ours, b"up")
        os.write(ours, "aé長\x7f\x7fb\r".encode())
        self.assertIn(b"[ab]", self.read_until(ours, b"]"))
        self.assertEqual(process.wait(30), 0)

    def read_until(self, terminal, wanted):
        text, deadline = b"", time.monotonic() + 30
        while wanted not in text and time.monotonic() < deadline:
            if select.select([terminal], [], [], 1)[0]:
                text += os.read(terminal, 4096)
        return text


class Packages(unittest.TestCase):
    def test_programs_that_users_install_for_themselves_are_found(self):
        if shell("python3 -m pip --version", check=False).returncode == 0:
            with zipfile.ZipFile(f"{scratch.home}/tool-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr("tool_of_pip.py", "def main(): print('from pip')\n")
                wheel.writestr("tool-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tool\nVersion: 1\n")
                wheel.writestr("tool-1.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: a\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                wheel.writestr("tool-1.dist-info/entry_points.txt", "[console_scripts]\ntool-of-pip = tool_of_pip:main\n")
                wheel.writestr("tool-1.dist-info/RECORD", "")
            wheel = upload("tool-1-py3-none-any.whl", pathlib.Path(f"{scratch.home}/tool-1-py3-none-any.whl").read_bytes())
            inside("python3", "-m", "pip", "install", "-q", "--no-index", wheel)
            self.found("tool-of-pip", "from pip\n")
        if shell("npm --version", check=False).returncode == 0:
            shell("mkdir -p /tmp/package && cd /tmp/package && printf '#!/bin/sh\\necho from npm\\n' > tool && chmod 755 tool && "
                  "echo '{\"name\": \"tool-of-npm\", \"version\": \"1.0.0\", \"bin\": {\"tool-of-npm\": \"tool\"}}' > package.json && npm pack --silent && "
                  "npm install -g --offline --no-audit --no-fund --silent ./tool-of-npm-1.0.0.tgz")
            self.found("tool-of-npm", "from npm\n")
        shell("printf '#!/bin/sh\\necho from me\\n' > ~/.local/bin/mine && chmod 755 ~/.local/bin/mine")
        self.found("mine", "from me\n")

    def found(self, program, says):
        """By a command itself, by a shell's command, and by a shell for a login."""
        self.assertEqual(inside(program).stdout, says)
        self.assertEqual(shell(program).stdout, says)
        self.assertEqual(inside("sh", "-lc", program).stdout, says)

    def test_the_package_manager_knows_where_it_stands(self):
        self.assertEqual(shell("dpkg --audit; dpkg --configure -a", root=True).stdout, "")
        self.assertNotEqual(shell("cat /etc/timezone").stdout.strip(), "")
        self.assertEqual(shell("stat -c %U:%a /var/lib/apt/lists/partial", root=True).stdout, "_apt:700\n")

    def test_packages_are_installed_from_a_repository_by_root_and_with_sudo(self):
        script = upload("build.sh", BUILD)
        inside("sh", script, root=True)
        install = "apt-get -q update && apt-get -q install -y {package} </dev/null"
        shell(install.format(package="nagaya-first"), root=True)
        self.assertEqual(inside("nagaya-first").stdout, "first\n")
        if shell("command -v sudo", check=False).returncode != 0:
            self.skipTest("this machine has no sudo to be in the image")
        told = shell("sudo -n true && " + install.replace("apt-get", "sudo apt-get").format(package="nagaya-second"))
        self.assertNotIn("unable to resolve", told.stderr)
        self.assertEqual(inside("nagaya-second").stdout, "second\n")
        # Its system user, the directory of that user, and the owner that the package database remembers.
        self.assertRegex(shell("stat -c %U /var/lib/nagaya-second; dpkg-statoverride --list /var/lib/nagaya-second").stdout,
                         "^nagaya-second\nnagaya-second root 750 ")
        # A configuration file that the sandbox has already is no question, and stays.
        self.assertEqual(shell("cat /etc/fstab").stdout, "")
        # What it depends on came with it, its service was not started, and it goes again.
        self.assertEqual(shell("dpkg -s nagaya-third | grep ^Status; test -e /tmp/started || echo not started").stdout,
                         "Status: install ok installed\nnot started\n")
        shell("sudo apt-get -q purge -y nagaya-second && sudo apt-get -q autoremove -y")
        self.assertNotEqual(shell("dpkg -s nagaya-third", check=False).returncode, 0)

    def test_the_log_is_kept(self):
        inside("logger", "-t", "me", "hello log")
        wait_until(lambda: "me: hello log" in shell("cat /var/log/syslog", root=True, check=False).stdout)
        # Whoever floods it is slowed down, and nobody else is.
        started = inside("timeout", "3", "sh", "-c", "yes 'a flood' | logger", check=False)
        self.assertEqual(started.returncode, 124)
        self.assertLess(int(shell("wc -c < /var/log/syslog", root=True).stdout), 2 << 20)
        shell("rm /var/log/syslog; mkfifo /var/log/syslog; logger nobody", root=True)
        self.assertEqual(inside("echo", "alive").stdout, "alive\n")
        shell("rm /var/log/syslog; logger again", root=True)
        wait_until(lambda: "again" in shell("cat /var/log/syslog", root=True, check=False).stdout)


# Three packages in a repository of their own: one alone, and one with what packages do to a system.
BUILD = r"""
set -e
rm -rf /srv/repository && mkdir -p /srv/repository && cd /srv/repository
make() {
    mkdir -p $1/DEBIAN $1/usr/bin
    printf '#!/bin/sh\necho %s\n' "${1#nagaya-}" > $1/usr/bin/$1
    chmod 755 $1/usr/bin/$1
    printf 'Package: %s\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDepends: %s\nDescription: a test\n' "$1" "$2" > $1/DEBIAN/control
}
make nagaya-first ""
make nagaya-third ""
make nagaya-second nagaya-third
sed -i '/^Depends: $/d' */DEBIAN/control
mkdir -p nagaya-second/etc/init.d
echo 'of the package' > nagaya-second/etc/fstab
printf '#!/bin/sh\ntouch /tmp/started\n' > nagaya-second/etc/init.d/nagaya-second
chmod 755 nagaya-second/etc/init.d/nagaya-second
printf '/etc/fstab\n/etc/init.d/nagaya-second\n' > nagaya-second/DEBIAN/conffiles
cat > nagaya-second/DEBIAN/postinst <<'END'
#!/bin/sh
set -e
useradd --system --home-dir /var/lib/nagaya-second --shell /usr/sbin/nologin nagaya-second
mkdir -p /var/lib/nagaya-second
dpkg-statoverride --update --add nagaya-second root 750 /var/lib/nagaya-second
if command -v invoke-rc.d >/dev/null; then
    update-rc.d nagaya-second defaults >/dev/null
    invoke-rc.d nagaya-second start
fi
END
cat > nagaya-second/DEBIAN/postrm <<'END'
#!/bin/sh
set -e
if [ "$1" = purge ]; then
    dpkg-statoverride --remove /var/lib/nagaya-second
    rm -rf /var/lib/nagaya-second
    update-rc.d nagaya-second remove >/dev/null 2>&1 || true
fi
END
chmod 755 nagaya-second/DEBIAN/postinst nagaya-second/DEBIAN/postrm
for package in nagaya-first nagaya-second nagaya-third; do
    dpkg-deb --build $package $package.deb >/dev/null
    dpkg-deb --field $package.deb
    printf 'Filename: ./%s.deb\nSize: %s\nSHA256: %s\n\n' $package $(stat -c %s $package.deb) $(sha256sum < $package.deb | cut -d' ' -f1)
done > /tmp/Packages
mv /tmp/Packages Packages
# Nothing outside is asked.
rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*
echo 'deb [trusted=yes] file:/srv/repository ./' > /etc/apt/sources.list
"""


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("it did not become true in time")
        time.sleep(0.2)


if __name__ == "__main__":
    unittest.main()
