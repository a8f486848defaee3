// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/proxy"
)

var proxyEnv = []string{"HTTP_PROXY=http://ada:p%24@gateway.lab.internal:3128", "http_proxy=http://ada:p%24@gateway.lab.internal:3128", "no_proxy=localhost,*.corp,[::1]"}

// What is run in a guest has the target's variables, whether its ssh server takes some
// from clients, as the agent's does, or not.
func TestTargetEnv(t *testing.T) {
	b := newBox(t)
	b.connect(t)
	if err := os.WriteFile(filepath.Join(b.dir, "etc/environment"), []byte("KEPT=1\nNO_PROXY=old\nhttp_proxy=old\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, agent := range map[string]bool{"through the agent": true, "through another server": false} {
		target := b.Target
		target.Env, target.Unset = proxyEnv, []string{"NO_PROXY", "http_proxy", "LANG"}
		if !agent {
			dial := target.Agent
			target.Port = func(ctx context.Context, _ uint16) (net.Conn, error) {
				return guest.DialSSH(ctx, guest.Target{Machine: "web", Dialers: guest.Dialers{Agent: dial}})
			}
			target.Agent = nil
		}
		c, err := guest.Connect(testContext(t), target)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, tt := range []struct {
			cmd  guest.Command
			want string
		}{
			{guest.Command{Shell: `echo "$http_proxy" "$no_proxy"`}, "http://ada:p%24@gateway.lab.internal:3128 localhost,*.corp,[::1]\n"},
			{guest.Command{Shell: "echo $KEPT $NO_PROXY $LAB_UNSET"}, "1\n"},
			{guest.Command{Args: []string{"printenv", "HTTP_PROXY"}}, "http://ada:p%24@gateway.lab.internal:3128\n"},
			{guest.Command{Shell: `echo "$http_proxy it's $0"`, Env: []string{"http_proxy=mine"}}, "mine it's /bin/sh\n"},
			{guest.Command{Stdin: strings.NewReader("echo $http_proxy\n")}, "http://ada:p%24@gateway.lab.internal:3128\n"}, // a login shell
		} {
			var out bytes.Buffer
			tt.cmd.Stdout = &out
			if err := c.Run(testContext(t), tt.cmd); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if diff := cmp.Diff(tt.want, out.String()); diff != "" {
				t.Errorf("%s: %s", name, diff)
			}
		}
		c.Close()
	}
}

// proxyProgram is the program for guests, with its files below dir.
func proxyProgram(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile("proxy.sh")
	if err != nil {
		t.Fatal(err)
	}
	return strings.NewReplacer("/etc/", dir+"/etc/", "/run/", dir+"/run/", "PATH=", "PATH="+dir+"/bin:").Replace(string(b))
}

func TestProxyProgram(t *testing.T) {
	for _, shell := range [][]string{{"dash"}, {"busybox", "sh"}, {"bash"}} {
		t.Run(shell[0], func(t *testing.T) { testProxyProgram(t, shell) })
	}
}

func testProxyProgram(t *testing.T, shell []string) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return string(b)
	}
	run := func(env ...string) {
		t.Helper()
		text := strings.Join(env, "\n")
		if text != "" {
			text += "\n"
		}
		cmd := exec.Command(shell[0], append(append([]string{}, shell[1:]...), "-c", proxyProgram(t, dir), "lab", strings.Join(proxy.Variables(), " "))...)
		cmd.Stdin = strings.NewReader(text)
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Fatalf("%v: %s", err, out)
		}
	}
	want := func(when, got, want string) {
		t.Helper()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", when, diff)
		}
	}
	const file = "etc/environment"
	write("etc/passwd", "", 0o644)
	run()
	want("nothing to take away", read(file), "")

	a, b := "http_proxy=http://ada:p%24@gateway.lab.internal:3128", "no_proxy=localhost,*"
	run(a, b)
	alone := "# begin: written by lab, as all of this file\n" + a + "\n" + b + "\n# end: written by lab\n"
	want("a new file", read(file), alone)
	if fi, err := os.Stat(filepath.Join(dir, file)); err != nil || fi.Mode() != 0o644 {
		t.Errorf("the new file: %v, %v", fi.Mode(), err)
	}
	run()
	if _, err := os.Stat(filepath.Join(dir, file)); !os.IsNotExist(err) {
		t.Errorf("the file is left: %v", err)
	}

	write(file, "PATH=\"/bin\"\n# mine\n", 0o640)
	run(a, b)
	want("beside others", read(file), "PATH=\"/bin\"\n# mine\n# begin: written by lab\n"+a+"\n"+b+"\n# end: written by lab\n")
	if fi, err := os.Stat(filepath.Join(dir, file)); err != nil || fi.Mode() != 0o640 {
		t.Errorf("the mode is not kept: %v, %v", fi.Mode(), err)
	}
	before, _ := os.Stat(filepath.Join(dir, file))
	run(a, b)
	if after, _ := os.Stat(filepath.Join(dir, file)); !os.SameFile(before, after) {
		t.Error("a file that is as it should be was replaced")
	}
	run(b)
	want("changed", read(file), "PATH=\"/bin\"\n# mine\n# begin: written by lab\n"+b+"\n# end: written by lab\n")
	write(file, read(file)+"X=1\n", 0o640)
	run()
	want("taken away", read(file), "PATH=\"/bin\"\n# mine\nX=1\n")
	write(file, "", 0o644)
	run(b)
	run()
	want("an empty file stays", read(file), "")
	if _, err := os.Stat(filepath.Join(dir, file)); err != nil {
		t.Error(err)
	}
	if got := proxy.WithoutBlock([]byte(alone)); got != "" || !proxy.HasBlock([]byte(alone)) {
		t.Errorf("Go and the shell mean different blocks: %q is left", got)
	}

	// With systemd, which is asked by a command that writes down what it is told.
	write("run/systemd/system/x", "", 0o644)
	write("bin/systemctl", "#!/bin/sh\necho \"$*; $http_proxy\" >>"+dir+"/told\n[ \"$1\" != show-environment ] || echo ftp_proxy=old\n", 0o755)
	run(a, b)
	const others = "ALL_PROXY FTP_PROXY HTTPS_PROXY HTTP_PROXY NO_PROXY all_proxy ftp_proxy https_proxy"
	want("systemd is told", read("told"), "import-environment http_proxy no_proxy; http://ada:p%24@gateway.lab.internal:3128\n"+
		"unset-environment "+others+"; http://ada:p%24@gateway.lab.internal:3128\n"+
		strings.Repeat("show-environment; http://ada:p%24@gateway.lab.internal:3128\n", 7)+
		"daemon-reload; http://ada:p%24@gateway.lab.internal:3128\n")
	const generator = "etc/systemd/system-environment-generators/90-lab-proxy"
	out, err := exec.Command(filepath.Join(dir, generator)).CombinedOutput()
	want("at the next boot", string(out), a+"\n"+b+"\n")
	if err != nil || strings.Contains(read(generator), "3128") {
		t.Errorf("the generator: %v, %s", err, read(generator))
	}
	write("told", "", 0o644)
	run()
	if _, err := os.Stat(filepath.Join(dir, filepath.Dir(generator))); !os.IsNotExist(err) {
		t.Errorf("the generator is left: %v", err)
	}
	if !strings.HasPrefix(read("told"), "unset-environment ALL_PROXY") || strings.Contains(read("told"), "import") {
		t.Error(read("told"))
	}
}
