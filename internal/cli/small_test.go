// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/engine"
)

func TestPlaceOf(t *testing.T) {
	for in, want := range map[string]place{
		"web:/srv": {"web", "/srv"}, "web:": {"web", "."}, "web:a:b": {"web", "a:b"}, "file": {"", "file"},
		"./web:a": {"", "./web:a"}, "/tmp/web:a": {"", "/tmp/web:a"}, "Web:a": {"", "Web:a"}, ":a": {"", ":a"},
	} {
		if got := placeOf(in); got != want {
			t.Errorf("placeOf(%q) = %+v, want %+v", in, got, want)
		}
	}
}

func TestFileOrURL(t *testing.T) {
	for in, want := range map[string]string{
		"disk.raw": "./disk.raw", "a/disk.raw": "./a/disk.raw", ".hidden": "./.hidden", "./disk.raw": "./disk.raw",
		"../disk.raw": "../disk.raw", "/disk.raw": "/disk.raw", "~/disk.raw": "~/disk.raw", "https://x/y": "https://x/y",
	} {
		if got := fileOrURL(in); got != want {
			t.Errorf("fileOrURL(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestLabelFrom(t *testing.T) {
	for in, want := range map[string]string{
		"shop": "shop", "My Shop": "my-shop", "--": "lab", "": "lab", "/": "lab", "été": "t",
		strings.Repeat("x", 80): strings.Repeat("x", 30),
	} {
		if got := labelFrom(in); got != want {
			t.Errorf("labelFrom(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestLastLines(t *testing.T) {
	for _, tc := range []struct {
		in   string
		n    int
		want string
	}{
		{"a\nb\nc\n", 2, "b\nc\n"}, {"a\nb\nc", 2, "b\nc"}, {"a\n", 5, "a\n"}, {"", 3, ""}, {"a\nb\n", 0, ""},
	} {
		if got := string(lastLines([]byte(tc.in), tc.n)); got != tc.want {
			t.Errorf("lastLines(%q, %d) = %q, want %q", tc.in, tc.n, got, tc.want)
		}
	}
}

func TestCleanerShowsControlCharacters(t *testing.T) {
	var b bytes.Buffer
	c := &cleaner{w: &b}
	for _, s := range []string{"[\x1b[0;32m  OK  \x1b[0m] Started\r\nbe", "ep\x07\n", "rest\x1b[2J"} {
		if _, err := io.WriteString(c, s); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	want := "[  OK  ] Started\nbeep\\x07\nrest\\x1b[2J\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

func TestBridgeEndsAtTheEscapeKey(t *testing.T) {
	ours, theirs := net.Pipe()
	typed, keys := io.Pipe()
	var out bytes.Buffer
	ended := make(chan error, 1)
	go func() { ended <- bridge(context.Background(), typed, &out, ours, time.Minute) }()
	go func() { _, _ = io.WriteString(keys, "ls\n\x1dnever sent") }()
	got := make([]byte, 3)
	if _, err := io.ReadFull(theirs, got); err != nil || string(got) != "ls\n" {
		t.Fatalf("the console got %q, %v", got, err)
	}
	// What is behind the key is not sent; an empty write may stand for it.
	go func() { _, _ = io.Copy(io.Discard, theirs) }()
	if err := <-ended; err != nil {
		t.Errorf("bridge returned %v", err)
	}
}

// A script's console ends when the machine has answered.
func TestBridgeEndsAfterTheAnswer(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	go func() {
		got := make([]byte, 3)
		if _, err := io.ReadFull(theirs, got); err == nil {
			_, _ = io.WriteString(theirs, "answer to "+string(got))
		}
		_, _ = io.Copy(io.Discard, theirs)
	}()
	out, answer := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- bridge(t.Context(), strings.NewReader("ls\n"), answer, ours, time.Second)
		answer.Close()
	}()
	if got, err := io.ReadAll(out); err != nil || string(got) != "answer to ls\n" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := <-ended; err != nil {
		t.Errorf("bridge returned %v", err)
	}
}

func TestAsk(t *testing.T) {
	for answer, want := range map[string]error{
		"y\n": nil, " YES \n": nil, "y": nil, "n\n": errDeclined, "\n": errDeclined, "": errDeclined, "yeah\n": errDeclined,
	} {
		a := testApp()
		a.In = strings.NewReader(answer)
		if got := a.ask(t.Context(), "Go on?"); !errors.Is(got, want) {
			t.Errorf("%q: got %v, want %v", answer, got, want)
		}
	}
}

// Ctrl-C at the question must not wait for an answer.
func TestAskIsInterrupted(t *testing.T) {
	silent, end := io.Pipe()
	defer end.Close()
	a := testApp()
	a.In = silent
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := a.ask(ctx, "Go on?")
	if code, text, _ := a.explain(ctx, err); code != ExitInterrupted || text != "interrupted" {
		t.Errorf("got %v: %d, %q, want %d, %q", err, code, text, ExitInterrupted, "interrupted")
	}
}

func TestSSHConfig(t *testing.T) {
	a := testApp()
	a.Program = "/opt/my lab/lab"
	got := a.sshConfig("shop-1f3a9c2b", []engine.SSHHost{{
		Name: "web", Lab: "shop", User: "root", KeyFile: "/data/100%/id_ed25519", KnownHostsFile: "/data/100%/known_hosts",
		HostKeyAlias: "web.shop-1f3a9c2b.lab.internal",
	}}, sshNames{short: true, bare: true})
	want := `# machines of lab shop-1f3a9c2b, written by "lab ssh-config"

Host web web.shop web.shop-1f3a9c2b
  HostName web.shop-1f3a9c2b
  CanonicalizeHostname no
  User root
  IdentityFile "/data/100%%/id_ed25519"
  IdentitiesOnly yes
  HostKeyAlias web.shop-1f3a9c2b.lab.internal
  UserKnownHostsFile "/data/100%%/known_hosts"
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  PreferredAuthentications publickey
  ProxyCommand '/opt/my lab/lab' ssh-proxy --lab shop-1f3a9c2b web
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
