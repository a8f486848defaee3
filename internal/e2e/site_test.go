// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// patience is how long any one command may take: emulation on two busy cores is
// slow, and a test that gives up early tells nothing.
const patience = 8 * time.Minute

// site is a folder with a Labfile in it, and the lab that comes of it.
type site struct {
	testing.TB
	w    *world
	dir  string
	env  []string // besides the world's
	name string   // --name; empty for the Labfile's own
	kept string   // where the provider keeps generations; empty for "machines"
	far  bool     // machines run on another host
	id   lab.ID
	gone bool // destroyed by the test itself
}

// site makes a folder with the given Labfile. When the test ends, the lab is
// destroyed, and nothing of it may be left.
func (w *world) site(t testing.TB, labfile string) *site {
	t.Helper()
	dir, err := os.MkdirTemp(w.path("sites"), "s")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{TB: t, w: w, dir: dir}
	// Every process that comes of this site carries its mark, however far it
	// is from the one that was started here.
	s.env = []string{mark + "=" + dir}
	s.write("Labfile", labfile)
	if err := w.own(dir); err != nil {
		t.Fatal(err)
	}
	s.id = lab.NewID(nameIn(labfile), filepath.Join(dir, "Labfile"))
	t.Cleanup(s.cleanup)
	return s
}

// nameIn finds the lab's name in a Labfile of ours.
func nameIn(labfile string) string {
	for line := range strings.Lines(labfile) {
		if name, ok := strings.CutPrefix(line, "lab:"); ok {
			return strings.TrimSpace(name)
		}
	}
	return ""
}

// second returns the instance of the same Labfile that --name makes.
func (s *site) second(name string) *site {
	s.Helper()
	two := *s
	two.name, two.id, two.gone = name, lab.NewID(name, filepath.Join(s.dir, "Labfile")), false
	s.Cleanup(two.cleanup)
	return &two
}

func (s *site) cleanup() {
	s.Helper()
	if s.Failed() {
		for _, args := range [][]string{{"status"}, {"history"}} {
			r := s.lab(args...)
			s.Logf("lab %s: exit %d\n%s%s", args[0], r.code, r.stdout, r.stderr)
		}
		s.logs()
	}
	if !s.gone {
		r := s.lab("destroy", "--yes", "--lab", string(s.id))
		if r.code != 0 && !strings.Contains(r.stderr, "no such lab") {
			s.Errorf("destroying at the end: exit %d\n%s", r.code, r.stderr)
		}
	}
	s.nothingLeft()
	if s.name != "" {
		return // the first instance, whose folder this is, counts them all
	}
	s.endDaemons()
	s.wait("every process of the folder has ended", func() bool { return len(s.processes()) == 0 })
}

// endDaemons ends libvirt's daemons of the site's world; by themselves they would stay
// for two minutes. What they start themselves has not the site's mark.
func (s *site) endDaemons() {
	s.Helper()
	s.wait("libvirt's daemons have ended", func() bool {
		ended := true
		for _, p := range processesWith(func(env, _ string) bool {
			return strings.Contains("\x00"+env, "\x00XDG_RUNTIME_DIR="+s.w.run+"\x00")
		}) {
			if p.is("libvirtd") || p.is("virtqemud") || p.is("virtlogd") {
				_ = syscall.Kill(p.pid, syscall.SIGKILL) // it may have ended just now
				ended = false
			}
		}
		return ended
	})
}

// machines is the folder of the lab's generations.
func (s *site) machines() string {
	kept := s.kept
	if kept == "" {
		kept = "machines"
	}
	return filepath.Join(s.w.data(), "labs", string(s.id), kept)
}

// logs shows what the machines said, for a test that failed.
func (s *site) logs() {
	files, _ := filepath.Glob(filepath.Join(s.machines(), "*", "*", "*.log"))
	more, _ := filepath.Glob(filepath.Join(s.w.data(), "labs", string(s.id), "*.log"))
	for _, file := range append(files, more...) {
		b, err := os.ReadFile(file)
		if err != nil || len(b) == 0 {
			continue
		}
		s.Logf("%s:\n%s", file, b[max(0, len(b)-3000):])
	}
}

// write puts a file into the site, as its user.
func (s *site) write(name, content string) string {
	s.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		s.Fatal(err)
	}
	if err := s.w.own(path); err != nil {
		s.Fatal(err)
	}
	return path
}

// read returns the content of a file.
func read(s *site, path string) []byte {
	s.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		s.Fatal(err)
	}
	return b
}

// result is how a command ended.
type result struct {
	args           []string
	code           int // as a shell tells it: 128 and the signal if one ended it
	stdout, stderr string
	took           time.Duration
}

func (r result) String() string {
	return fmt.Sprintf("lab %s: exit %d after %s\n--- stdout\n%s--- stderr\n%s",
		strings.Join(r.args, " "), r.code, r.took.Round(time.Millisecond), r.stdout, r.stderr)
}

// output collects what a process writes; it can be read meanwhile.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// process is a command that runs.
type process struct {
	*exec.Cmd
	stdout, stderr *output
	began          time.Time
	args           []string
	t              testing.TB
	cancel         context.CancelFunc
}

// command prepares any program in the site's folder, as its user.
func (s *site) command(ctx context.Context, env []string, name string, args ...string) *exec.Cmd {
	cmd := s.w.command(ctx, name, args...)
	cmd.Dir = s.dir
	cmd.Env = append(s.w.env(s.env...), env...)
	return cmd
}

// command prepares any program, as the world's user.
func (w *world) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = w.base
	cmd.Env = w.env(mark + "=" + w.base)
	// A session of its own: a signal meant for it does not hit the tests.
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: w.cred, Setsid: true}
	// If it takes too long, all that came of it ends.
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// options are the flags that choose this site's lab.
func (s *site) options(args []string) []string {
	if s.name == "" {
		return args
	}
	return append([]string{"--name", s.name}, args...)
}

// start starts lab and does not wait for it.
func (s *site) start(args ...string) *process {
	s.Helper()
	return s.startWith(nil, "", args...)
}

func (s *site) startWith(env []string, stdin string, args ...string) *process {
	s.Helper()
	return s.begin(env, stdin, labBinary, s.options(args))
}

// program starts another program than lab.
func (s *site) program(name string, args ...string) *process {
	s.Helper()
	return s.begin(nil, "", name, args)
}

func (s *site) begin(env []string, stdin, program string, args []string) *process {
	s.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	p := &process{
		Cmd:    s.command(ctx, env, program, args...),
		stdout: new(output), stderr: new(output),
		began: time.Now(), args: args, t: s.TB, cancel: cancel,
	}
	p.Stdin = strings.NewReader(stdin)
	p.Stdout, p.Stderr = p.stdout, p.stderr
	if err := p.Start(); err != nil {
		cancel()
		s.Fatal(err)
	}
	return p
}

// end waits for the process.
func (p *process) end() result {
	p.t.Helper()
	defer p.cancel()
	err := p.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Errorf("lab %s: %v", strings.Join(p.args, " "), err)
	}
	code := p.ProcessState.ExitCode()
	if status, ok := p.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		code = 128 + int(status.Signal())
	}
	return result{p.args, code, p.stdout.String(), p.stderr.String(), time.Since(p.began)}
}

// signal sends the process a signal.
func (p *process) signal(sig syscall.Signal) {
	p.t.Helper()
	if err := p.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Errorf("sending %s: %v", sig, err)
	}
}

// lab runs lab to its end.
func (s *site) lab(args ...string) result {
	s.Helper()
	return s.start(args...).end()
}

// ok runs lab, which must succeed, and returns its standard output.
func (s *site) ok(args ...string) string {
	s.Helper()
	r := s.lab(args...)
	if r.code != 0 {
		s.Fatal(r)
	}
	return r.stdout
}

// fails runs lab, which must end with the exit code and have all of want in its
// standard error.
func (s *site) fails(code int, want []string, args ...string) result {
	s.Helper()
	return s.failed(s.lab(args...), code, want...)
}

func (s *site) failed(r result, code int, want ...string) result {
	s.Helper()
	if r.code != code {
		s.Fatalf("want exit %d: %s", code, r)
	}
	for _, text := range want {
		if !strings.Contains(r.stderr, text) {
			s.Errorf("stderr lacks %q: %s", text, r)
		}
	}
	return r
}

// equal checks an answer that is known exactly.
func (s *site) equal(what, got, want string) {
	s.Helper()
	if got != want {
		s.Errorf("%s: got %q, want %q", what, got, want)
	}
}

// status is the part of "lab status --json" that the tests rely on.
type status struct {
	ID         string    `json:"id"`
	Name       string    `json:"name"`
	Labfile    string    `json:"labfile"`
	Supervisor string    `json:"supervisor"`
	Machines   []machine `json:"machines"`
}

type machine struct {
	Name       string `json:"name"`
	Role       string `json:"role"`
	Generation int    `json:"generation"`
	State      string `json:"state"`
	Reason     string `json:"reason"`
	Address    string `json:"address"`
	Image      string `json:"image"`
	PID        int    `json:"pid"`
	Accel      string `json:"accel"`
	Direct     string
	Ports      []struct {
		Host  int `json:"host"`
		Guest int `json:"guest"`
	} `json:"ports"`
}

func (s *site) status() status {
	s.Helper()
	var st status
	if out := s.ok("status", "--json"); json.Unmarshal([]byte(out), &st) != nil {
		s.Fatalf("lab status --json is not JSON: %q", out)
	}
	return st
}

// machine returns the status of one machine.
func (s *site) machine(name string) machine {
	s.Helper()
	st := s.status()
	for _, m := range st.Machines {
		if m.Name == name {
			return m
		}
	}
	s.Fatalf("lab status knows no machine %q: %+v", name, st)
	return machine{}
}

// wait polls until cond holds; it is for what lab itself does not announce.
func (s *site) wait(what string, cond func() bool) {
	s.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !cond() {
		if time.Now().After(deadline) {
			s.Fatalf("waited in vain: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
