// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/creack/pty"

	"github.com/labfile/lab/providers/qmp"
)

func execCommands(s *site) {
	s.equal("a command", s.ok("exec", "db", "--", "hostname"), "db\n")
	s.equal("a shell line", s.ok("exec", "db", "--", "echo a; echo b | tr b c"), "a\nc\n")
	s.equal("arguments", s.ok("exec", "db", "--", "printf", "%s|", "a b", "it's", "$HOME", "*"), "a b|it's|$HOME|*|")
	s.fails(7, nil, "exec", "db", "--", "exit 7")
	r := s.lab("exec", "db", "--", "echo out; echo err >&2")
	s.equal("stdout", r.stdout, "out\n")
	s.equal("stderr", r.stderr, "err\n")
	r = s.startWith(nil, "through\n", "exec", "db", "--", "cat").end()
	s.equal("stdin", r.stdout, "through\n")
	lines := strings.Split(strings.TrimSpace(s.ok("exec", "--all", "--", "hostname")), "\n")
	slices.Sort(lines)
	if len(lines) != 3 || !strings.Contains(lines[0], "db") || !strings.Contains(lines[2], "web-2") {
		s.Errorf("exec --all: %q", lines)
	}
	s.fails(3, []string{`web-1`, "lab: hint: "}, "exec", "wbe-1", "--", "true")
	s.equal("ssh", s.ok("ssh", "web-1", "--", "echo", "hello"), "hello\n")
	s.fails(5, nil, "ssh", "web-1", "--", "exit 5")

	// Ctrl-C ends the command in the guest too.
	p := s.start("exec", "db", "--", "echo begun; exec sleep 4711")
	s.wait("the command runs", func() bool {
		return strings.Contains(s.ok("exec", "db", "--", "ps"), "sleep 4711")
	})
	p.signal(syscall.SIGINT)
	if r := p.end(); r.code != 130 {
		s.Errorf("interrupted exec: %s", r)
	}
	s.wait("the command has ended", func() bool {
		return !strings.Contains(s.ok("exec", "db", "--", "ps"), "sleep 4711")
	})
}

func cpBothWays(s *site) {
	content := make([]byte, 3<<20)
	_, _ = rand.Read(content) // never fails
	big := s.write("big", string(content))
	if err := os.Chmod(big, 0o750); err != nil {
		s.Fatal(err)
	}
	s.ok("cp", "big", "db:/root/big")
	s.equal("mode", s.ok("exec", "db", "--", "stat -c %a:%s /root/big"), fmt.Sprintf("750:%d\n", len(content)))
	s.ok("cp", "db:/root/big", "back")
	back, err := os.ReadFile(filepath.Join(s.dir, "back"))
	if err != nil {
		s.Fatal(err)
	}
	if !bytes.Equal(back, content) {
		s.Errorf("%d bytes went in, %d others came back", len(content), len(back))
	}
	if err := os.MkdirAll(filepath.Join(s.dir, "tree", "sub"), 0o755); err != nil {
		s.Fatal(err)
	}
	s.write("tree/a", "A")
	s.write("tree/sub/b", "B")
	if err := s.w.own(filepath.Join(s.dir, "tree")); err != nil {
		s.Fatal(err)
	}
	s.ok("cp", "tree", "db:/root/tree")
	s.equal("tree in the guest", s.ok("exec", "db", "--", "cat /root/tree/a /root/tree/sub/b"), "AB")
	s.ok("cp", "db:/root/tree", "again")
	b, err := os.ReadFile(filepath.Join(s.dir, "again", "sub", "b"))
	s.equal("tree back", fmt.Sprintf("%s %v", b, err), "B <nil>")
	s.fails(1, []string{"db has no file or folder /root/none"}, "cp", "db:/root/none", "none")

	// By standard input and output, by pattern, and what is in a folder.
	r := s.startWith(nil, "typed", "cp", "-", "db:/root/tree/typed").end()
	s.equal("from standard input", fmt.Sprint(r.code, r.stderr), "0")
	s.equal("to standard output", s.ok("cp", "db:/root/tree/typed", "-"), "typed")
	s.equal("to a link to it", s.ok("cp", "db:/root/tree/typed", "/dev/stdout"), "typed")
	if fi, err := os.Lstat("/dev/stdout"); err != nil || fi.Mode().Type() != os.ModeSymlink {
		s.Fatalf("/dev/stdout is now %v, %v", fi, err)
	}
	s.ok("cp", "db:/root/tree/[a-s]*", "again/sub")
	s.ok("cp", "again/sub/.", "db:/root/tree/sub")
	s.equal("contents", s.ok("exec", "db", "--", "cd /root/tree/sub; echo *"), "a b sub\n")
}

// standsStill has a machine stand still, by its monitor or else by a signal to its
// hypervisor: who waits for the guest is told within five seconds, and its clock is right
// again afterwards.
func standsStill(s *site) {
	const name = "web-2"
	pid := s.machine(name).PID
	signal := func(sig syscall.Signal) func() error { return func() error { return syscall.Kill(pid, sig) } }
	stop, cont := signal(syscall.SIGSTOP), signal(syscall.SIGCONT)
	if socket := filepath.Join(s.w.run, "lab", string(s.id), name+".qmp"); exists(socket) {
		tell := func(word string) func() error {
			return func() error {
				c, err := qmp.Dial(s.Context(), socket)
				if err != nil {
					return err
				}
				defer c.Close()
				return c.Execute(s.Context(), word, nil, nil)
			}
		}
		stop, cont = tell("stop"), tell("cont")
	}
	p := s.start("exec", name, "--", "echo begun; sleep 3")
	s.wait("the command runs", func() bool { return p.stdout.String() != "" })
	log := s.start("logs", name, "--follow")
	config := s.write("ssh.conf", s.ok("ssh-config", "--bare"))
	plain := s.program("ssh", "-F", config, name, "echo begun; sleep 600")
	s.wait("the others are at it", func() bool { return log.stdout.String() != "" && plain.stdout.String() != "" })
	stopped := time.Now()
	if err := stop(); err != nil {
		s.Fatal(err)
	}
	for _, p := range []*process{p, log, plain} {
		s.wait("the pause is told", func() bool { return strings.Contains(p.stderr.String(), name+" is paused") })
	}
	s.Logf("told after %v", time.Since(stopped))
	s.wait("it has stood still for six seconds", func() bool { return time.Since(stopped) > 6*time.Second })
	if err := cont(); err != nil {
		s.Fatal(err)
	}
	if r := p.end(); r.code != 0 {
		s.Error(r)
	}
	for _, p := range []*process{log, plain} {
		s.wait("that it goes on is told", func() bool { return strings.Contains(p.stderr.String(), name+" answers again") })
		p.signal(syscall.SIGINT)
		p.end()
	}
	s.wait("the clock is right", func() bool {
		guest, err := strconv.ParseInt(strings.TrimSpace(s.ok("exec", name, "--", "date +%s")), 10, 64)
		return err == nil && time.Since(time.Unix(guest, 0)) < 3*time.Second
	})
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// pings checks that one machine knows another by name, at its address.
func (s *site) pings(from, name, address string) {
	s.Helper()
	out := s.ok("exec", from, "--", "ping -c 1 -w 20 "+name)
	if !strings.Contains(out, "("+address+")") {
		s.Errorf("%s pings %s, which should be %s:\n%s", from, name, address, out)
	}
}

// reached is the address by which the others reach a machine.
func (s *site) reached(name string) string {
	s.Helper()
	m := s.machine(name)
	if m.Direct != "" {
		return m.Direct
	}
	return m.Address
}

func names(s *site) {
	db := s.reached("db")
	for _, name := range []string{"db", "db.lab.internal", "DB", "Db.Lab.Internal"} {
		s.pings("web-1", name, db)
	}
	s.pings("db", "web-2", s.reached("web-2"))
	s.fails(1, nil, "exec", "db", "--", "ping -c 1 -w 5 nobody.lab.internal")
}

func forwards(s *site) {
	s.ok("exec", "web-1", "--", "echo served > /srv/www/index.html")
	m := s.machine("web-1")
	if len(m.Ports) != 1 || m.Ports[0].Guest != 80 || m.Ports[0].Host == 0 {
		s.Fatalf("ports: %+v", m.Ports)
	}
	url := fmt.Sprintf("http://127.0.0.1:%d/", m.Ports[0].Host)
	client := http.Client{Timeout: time.Minute}
	resp, err := client.Get(url)
	if err != nil {
		s.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	s.equal("GET "+url, fmt.Sprintf("%s %v", body, err), "served\n <nil>")

	// proc_net_tcp(5): the local address in hexadecimal, state 0A listens.
	port := fmt.Sprintf(":%04X ", m.Ports[0].Host)
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(table)
		if err != nil && !os.IsNotExist(err) {
			s.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) > 3 && strings.HasSuffix(f[1]+" ", port) && f[3] == "0A" && !strings.HasPrefix(f[1], "0100007F:") {
				s.Errorf("the forward listens beyond 127.0.0.1: %s", line)
			}
		}
	}
	// One machine serves the other by name.
	s.equal("wget", s.ok("exec", "db", "--", "wget -T 30 -q -O - http://web-1/"), "served\n")
}

// loopback checks that no guest gets to what listens on the host's loopback.
func loopback(s *site) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.Fatal(err)
	}
	defer l.Close()
	var met atomic.Int32
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			met.Add(1)
			c.Close()
		}
	}()
	port := l.Addr().(*net.TCPAddr).Port
	gateway := s.machine("db").Address
	gateway = gateway[:strings.LastIndex(gateway, ".")] + ".1"
	last := gateway[:strings.LastIndex(gateway, ".")] + ".254"
	for _, host := range []string{gateway, last, "127.0.0.1", "192.168.127.254", "host.containers.internal", "gateway.lab.internal"} {
		r := s.lab("exec", "db", "--", fmt.Sprintf("nc -w 3 %s %d </dev/null", host, port))
		if r.code == 0 && strings.TrimSpace(r.stdout) != "" {
			s.Errorf("a guest talked to the host's loopback by %s: %s", host, r)
		}
	}
	if n := met.Load(); n != 0 {
		s.Errorf("%d connections from a guest reached the host's loopback", n)
	}

	// But for a port that the Labfile lists, for as long as it does.
	text := string(read(s, filepath.Join(s.dir, "Labfile")))
	reach := func() {
		s.Helper()
		s.ok("exec", "db", "--", fmt.Sprintf("nc -w 3 this-host %d </dev/null || true", port))
	}
	s.write("Labfile", text+fmt.Sprintf("expose: [{name: this-host, port: %d}]\n", port))
	if r, want := s.fails(2, nil, "plan"), fmt.Sprintf("this-host:%d leads to port %[1]d of this host", port); !strings.Contains(r.stdout, want) {
		s.Errorf("the plan lacks %q: %s", want, r)
	}
	s.ok("up")
	s.ok("plan")
	reach()
	if n := met.Load(); n != 1 {
		s.Errorf("%d connections reached the port that is exposed", n)
	}
	s.write("Labfile", text)
	s.ok("up")
	reach()
	if n := met.Load(); n != 1 {
		s.Errorf("%d connections reached a port that is no longer exposed", n-1)
	}
}

// openSSH uses the programs that everybody has.
func openSSH(s *site) {
	config := s.write("ssh.conf", s.ok("ssh-config", "--bare"))
	run := func(name string, args ...string) string {
		s.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		cmd := s.command(ctx, nil, name, args...)
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil {
			s.Fatalf("%s %q: %v\n%s%s", name, args, err, out.String(), errs.String())
		}
		return out.String()
	}
	s.equal("ssh", run("ssh", "-F", config, "web-1", "hostname; id -un"), "web-1\nroot\n")
	s.write("up.txt", "there and back\n")
	run("scp", "-q", "-F", config, "up.txt", "web-1:/tmp/x")
	run("scp", "-q", "-F", config, "web-1:/tmp/x", "down.txt")
	b, err := os.ReadFile(filepath.Join(s.dir, "down.txt"))
	s.equal("scp", fmt.Sprintf("%s%v", b, err), "there and back\n<nil>")
	batch := s.write("batch", "put up.txt /tmp/y\nget /tmp/y sftp.txt\n")
	run("sftp", "-q", "-F", config, "-b", batch, "web-1")
	b, err = os.ReadFile(filepath.Join(s.dir, "sftp.txt"))
	s.equal("sftp", fmt.Sprintf("%s%v", b, err), "there and back\n<nil>")

	// A port of the guest's leads to this host, and a socket to this host's ssh agent.
	host := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "from the host") }))
	defer host.Close()
	s.equal("ssh -R", run("ssh", "-F", config, "-o", "ExitOnForwardFailure=yes", "-R", "7070:"+host.Listener.Addr().String(), "web-1",
		"wget -q -O - http://127.0.0.1:7070/"), "from the host\n")
	s.equal("ssh -A", run("ssh-agent", "ssh", "-F", config, "-A", "web-1", "test -S $SSH_AUTH_SOCK && echo socket"), "socket\n")

	// A host key that is not the one lab made is refused.
	known, err := os.ReadFile(config)
	if err != nil {
		s.Fatal(err)
	}
	s.write("empty", "")
	var wrong strings.Builder
	for line := range strings.Lines(string(known)) {
		if strings.Contains(line, "UserKnownHostsFile") {
			line = "  UserKnownHostsFile " + filepath.Join(s.dir, "empty") + "\n"
		}
		wrong.WriteString(line)
	}
	bad := s.write("bad.conf", wrong.String())
	out, err := s.command(context.Background(), nil, "ssh", "-F", bad, "web-1", "true").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "verification failed") {
		s.Errorf("ssh without the host's key: %v\n%s", err, out)
	}
}

func logsFollow(s *site) {
	if out := s.ok("logs", "web-1"); len(out) == 0 {
		s.Error("lab logs is empty")
	}
	p := s.start("logs", "-F", "web-1")
	s.ok("exec", "web-1", "--", "echo followed-line > /dev/console")
	s.wait("lab logs -F shows a new line", func() bool { return strings.Contains(p.stdout.String(), "followed-line") })
	p.signal(syscall.SIGINT)
	s.failed(p.end(), 130)
	if out := s.ok("logs", "web-1"); !strings.Contains(out, "followed-line") {
		s.Errorf("lab logs: %q", out)
	}
}

// terminal runs lab on a terminal: it types each of the keys after the text
// before it has appeared, and returns what was shown.
func (s *site) terminal(args []string, talk ...[2]string) (string, int) {
	s.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := s.command(ctx, []string{"TERM=xterm"}, labBinary, s.options(args)...)
	tty, err := pty.StartWithAttrs(cmd, &pty.Winsize{Rows: 24, Cols: 80}, &syscall.SysProcAttr{
		Credential: s.w.cred, Setsid: true, Setctty: true,
	})
	if err != nil {
		s.Fatal(err)
	}
	defer tty.Close()
	var shown strings.Builder
	chunks := make(chan string)
	go func() {
		defer close(chunks)
		buf := make([]byte, 4096)
		for {
			n, err := tty.Read(buf)
			if n > 0 {
				chunks <- string(buf[:n])
			}
			if err != nil {
				return
			}
		}
	}()
	deadline := time.After(patience)
	seen := 0
	for _, t := range talk {
		for !strings.Contains(shown.String()[seen:], t[0]) {
			select {
			case c, ok := <-chunks:
				if !ok {
					s.Fatalf("lab %q ended before it showed %q:\n%s", args, t[0], shown.String())
				}
				shown.WriteString(c)
			case <-deadline:
				s.Fatalf("lab %q never showed %q:\n%s", args, t[0], shown.String())
			}
		}
		seen = shown.Len()
		if _, err := tty.WriteString(t[1]); err != nil {
			s.Fatal(err)
		}
	}
	for c := range chunks {
		shown.WriteString(c)
	}
	_ = cmd.Wait() // the exit code says it
	return shown.String(), cmd.ProcessState.ExitCode()
}

func console(s *site) {
	shown, code := s.terminal([]string{"console", "web-2"},
		[2]string{"", "\r"},
		[2]string{"#", "echo con$((1+1))sole\r"},
		[2]string{"con2sole", "\x1d"}) // Ctrl-]
	if code != 0 {
		s.Errorf("lab console: exit %d\n%s", code, shown)
	}
	shown, code = s.terminal([]string{"ssh", "web-2"},
		[2]string{"#", "tty; stty size; exit 3\r"})
	if code != 3 || !strings.Contains(shown, "/dev/pts/") || !strings.Contains(shown, "24 80") {
		s.Errorf("lab ssh on a terminal: exit %d\n%s", code, shown)
	}
}
