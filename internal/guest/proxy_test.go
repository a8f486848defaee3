// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"bytes"
	"context"
	"io"
	mimetype "mime"
	"mime/multipart"
	"net"
	"net/mail"
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

// Whatever the format of user data, cloud-init gets the proxy settings as a boothook, and
// the user's own bootcmd stays as written.
func TestProxyInASeed(t *testing.T) {
	const archive = "#cloud-config-archive\n- type: text/cloud-config\n  content: |\n    bootcmd: [touch /mine]\n"
	const jinja = "## template: jinja\n#cloud-config\nbootcmd: [touch /mine, 'echo {{ v1.region }}']\n"
	const mime = "Content-Type: multipart/mixed; boundary=\"x\"\nMIME-Version: 1.0\n\n--x\nContent-Type: text/cloud-config\n\n#cloud-config\nbootcmd: [touch /mine]\n--x--\n"
	const plain = "#cloud-config\nx: &own [touch /mine]\nbootcmd: *own\n"
	for _, c := range []struct {
		name, data string
		want       []string // types of the parts
		kept       string   // content of the part before the last, or in the last if that is ours and the user's
	}{
		{"none", "", []string{"text/cloud-boothook", "text/cloud-config"}, "preserve_hostname: true"},
		{"plain", plain, []string{"text/cloud-boothook", "text/cloud-config"}, "bootcmd: *own\n"},
		{"archive", archive, []string{"text/cloud-boothook", "text/cloud-config-archive", "text/cloud-config"}, strings.TrimSpace(archive)},
		{"jinja", jinja, []string{"text/cloud-boothook", "text/jinja2", "text/cloud-config"}, strings.TrimSpace(jinja)},
		{"MIME", mime, []string{"text/cloud-boothook", "multipart/mixed", "text/cloud-config"}, "bootcmd: [touch /mine]\n--x--"},
	} {
		vol, err := guest.Seed(guest.SeedConfig{AgentRuns: true, UserData: c.data, Proxy: proxyEnv})
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		_, user, _ := strings.Cut(string(readSeed(t, vol)), "--- user-data 1980-01-01\n")
		user, _, _ = strings.Cut(user, "--- network-config")
		msg, err := mail.ReadMessage(strings.NewReader(user))
		if err != nil {
			t.Errorf("%s: %v\n%s", c.name, err, user)
			continue
		}
		_, params, err := mimetype.ParseMediaType(msg.Header.Get("Content-Type"))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		var types, texts []string
		for r := multipart.NewReader(msg.Body, params["boundary"]); ; {
			p, err := r.NextRawPart()
			if err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("%s: %v\n%s", c.name, err, user)
			}
			kind, _, _ := mimetype.ParseMediaType(p.Header.Get("Content-Type"))
			text, err := io.ReadAll(p)
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			types, texts = append(types, kind), append(texts, string(text))
		}
		if diff := cmp.Diff(c.want, types); diff != "" {
			t.Errorf("%s: parts (-want +got):\n%s", c.name, diff)
			continue
		}
		if !strings.Contains(texts[1], c.kept) || strings.Contains(strings.Join(texts[1:], ""), "3128") {
			t.Errorf("%s: the user's part is\n%s", c.name, texts[1])
		}
		if c.name == "none" {
			testBoothook(t, texts[0])
		}
	}
}

// testBoothook runs a boothook as cloud-init would.
func testBoothook(t *testing.T, text string) {
	dir := t.TempDir()
	for _, d := range []string{"bin", "etc"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	per := "#!/bin/sh\necho \"$1 $2\" >" + dir + "/per\nshift 2\nexec \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "bin/cloud-init-per"), []byte(per), 0o755); err != nil {
		t.Fatal(err)
	}
	text, ok := strings.CutPrefix(text, "#cloud-boothook\n")
	if !ok || !strings.HasPrefix(text, "#!/bin/sh\n") {
		t.Fatalf("not a boothook:\n%s", text)
	}
	hook := filepath.Join(dir, "hook")
	if err := os.WriteFile(hook, []byte(strings.NewReplacer("/etc/", dir+"/etc/", "/run/", dir+"/run/").Replace(text)), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", hook)
	cmd.Env = []string{"PATH=" + dir + "/bin:" + os.Getenv("PATH")}
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("%v: %s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(dir, "etc/environment"))
	want := "# begin: written by lab, as all of this file\n" + strings.Join(proxyEnv, "\n") + "\n# end: written by lab\n"
	if diff := cmp.Diff(want, string(got)); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if per, err := os.ReadFile(filepath.Join(dir, "per")); string(per) != "instance lab-proxy\n" {
		t.Errorf("how often it runs: %q, %v", per, err)
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
