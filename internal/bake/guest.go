// SPDX-License-Identifier: Apache-2.0

package bake

import (
	"bytes"
	"cmp"
	"context"
	_ "embed" // clean.sh
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
)

// Guest is a login to the machine: *guest.Client.
type Guest interface {
	Run(ctx context.Context, cmd guest.Command) error
}

// Machine is what steps are run in: a throw-away machine, or a generation at its first boot.
type Machine struct {
	Guest
	User     string // the user of the login
	Sudo     bool   // the login is not root's
	Hostname string // of the machine
	Key      string // the public key that opens it, as in authorized_keys(5)
	Dir      string // the host's folder that files are relative to

	Env []string // NAME=VALUE, of shell steps; no part of what they make
}

// FailedError says that a step did not succeed.
type FailedError struct {
	Code   int      // exit code; 0 if it did not end by itself
	Signal string   // that ended it, without SIG
	Output []string // the last lines of what it printed
	Err    error
}

// Error implements error. The output is left to whoever shows it.
func (e *FailedError) Error() string {
	switch {
	case e.Signal != "":
		return "ended by SIG" + e.Signal
	case e.Code != 0:
		return fmt.Sprintf("exit code %d", e.Code)
	}
	return e.Err.Error()
}

// Unwrap returns the cause, if it is another than the step's own end: the exit code
// of a step is not that of lab.
func (e *FailedError) Unwrap() error {
	if e.Signal != "" || e.Code != 0 {
		return nil
	}
	return e.Err
}

// sh makes a command that runs a program of /bin/sh as root.
func (m *Machine) sh(program string, args ...string) []string {
	cmd := append([]string{"/bin/sh", "-c", program, "lab-step"}, args...)
	if m.Sudo {
		return append([]string{"sudo", "-n", "--"}, cmd...)
	}
	return cmd
}

// Run runs a step. Each line that it prints is told to out, both of its streams in
// one. Errors: *FailedError, ctx's cause.
func (m *Machine) Run(ctx context.Context, p lab.Provision, l lab.Layer, out func(line string)) error {
	lines := &lines{tell: out}
	err := m.step(ctx, p, l, lines)
	lines.end()
	if err == nil || ctx.Err() != nil {
		return err
	}
	return lines.failed(err)
}

// failed returns why the step did not succeed that printed the lines.
func (l *lines) failed(err error) *FailedError {
	l.mu.Lock() // a command that was given up may print on
	f := &FailedError{Output: slices.Clone(l.last), Err: err}
	l.mu.Unlock()
	var exit *guest.ExitError
	if errors.As(err, &exit) {
		f.Code, f.Signal = exit.Code, exit.Signal
	}
	return f
}

func (m *Machine) step(ctx context.Context, p lab.Provision, l lab.Layer, out io.Writer) error {
	switch p.Kind {
	case lab.ProvisionShell:
		return m.shell(ctx, p, l, out)
	case lab.ProvisionFile:
		return m.file(ctx, p, l, out)
	}
	return fmt.Errorf("lab knows no step of the kind %q", p.Kind)
}

// shellProgram reads the step from its input, so that the step's own input is empty. Before
// it come variables, one a line, and an empty line: what they hold must be seen neither in a list of
// processes nor in a log of sudo. $1 is its name, $2 its interpreter if it does not name one, $3 the
// seconds that it may take, 0 for no limit, the rest its arguments.
//
// It ends the step's processes when the time is over: an ssh server with a login that is not
// root's signals them as that user, which cannot end programs that sudo runs. They are its
// process group, which such a server makes for each command.
const shellProgram = `d=$(mktemp -d /tmp/lab-step.XXXXXX) || exit
w=
trap 'rm -rf "$d"; [ -z "$w" ] || kill "$w" 2>/dev/null' EXIT
trap 'exit 143' TERM HUP INT
f=$d/$1 by=$2
if [ "$3" -gt 0 ]; then
	(trap 'kill $!; exit' TERM; sleep "$3" & wait $!; trap '' TERM; rm -rf "$d"; kill -TERM 0; sleep 2; kill -KILL 0) </dev/null >/dev/null 2>&1 &
	w=$!
fi
shift 3
while IFS= read -r v && [ -n "$v" ]; do export "$v"; done
cat >"$f" && chmod 700 "$f" || exit
cd /root 2>/dev/null || cd /
umask 022
export DEBIAN_FRONTEND=noninteractive HOME=/root USER=root LOGNAME=root
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
if [ -n "$by" ]; then /bin/sh -e "$f" "$@"; else "$f" "$@"; fi </dev/null 2>&1`

func (m *Machine) shell(ctx context.Context, p lab.Provision, l lab.Layer, out io.Writer) error {
	program := []byte(p.Shell)
	if p.Script != "" {
		if err := unchanged(m.Dir, p, l); err != nil {
			return err
		}
		b, err := os.ReadFile(onHost(m.Dir, p.Script))
		if err != nil {
			return err
		}
		program = b
	}
	return m.execute(ctx, p, program, 0, out)
}

// onHost is the path of a step's file on the host, given the folder that it is relative
// to.
func onHost(dir, file string) string {
	if filepath.IsAbs(file) {
		return file
	}
	return filepath.Join(dir, file)
}

// execute runs the program of a shell step. The guest ends it after limit, unless that is 0.
func (m *Machine) execute(ctx context.Context, p lab.Provision, program []byte, limit time.Duration, out io.Writer) error {
	name, by := "step", "sh"
	if p.Script != "" {
		name = path.Base(filepath.ToSlash(p.Script))
	}
	if bytes.HasPrefix(program, []byte("#!")) {
		by = ""
	}
	return m.Guest.Run(ctx, guest.Command{
		Args:  m.sh(shellProgram, append([]string{name, by, seconds(limit)}, p.Args...)...),
		Stdin: io.MultiReader(strings.NewReader(strings.Join(append(slices.Clone(m.Env), "\n"), "\n")), bytes.NewReader(program)), Stdout: out, Stderr: out,
	})
}

// seconds is a duration in whole ones, rounded up.
func seconds(d time.Duration) string { return strconv.Itoa(int((d + time.Second - 1) / time.Second)) }

// looks is what a file step has to know of the guest. Its input is a list of paths,
// of which it prints those that are folders.
const looks = `cat /etc/passwd && echo lab-step-next && cat /etc/group && echo lab-step-next || exit
while IFS= read -r d; do
	[ -d "$d" ] && printf '%s\n' "$d"
done
:`

func (m *Machine) file(ctx context.Context, p lab.Provision, l lab.Layer, out io.Writer) error {
	t, err := NewTree(m.Dir, p, l)
	if err != nil {
		return err
	}
	var found bytes.Buffer
	ask := strings.Join(slices.Concat(t.Folders(), t.Paths()), "\n") + "\n"
	if err := m.Guest.Run(ctx, guest.Command{Args: m.sh(looks), Stdin: strings.NewReader(ask), Stdout: &found, Stderr: out}); err != nil {
		return err
	}
	parts := strings.SplitN(found.String(), "lab-step-next\n", 3)
	if len(parts) != 3 {
		return errors.New("the guest did not say which accounts it has")
	}
	there := map[string]bool{}
	for line := range strings.Lines(parts[2]) {
		there[strings.TrimSuffix(line, "\n")] = true
	}
	for _, f := range t.Paths() {
		if there[f] {
			return fmt.Errorf("%s is a folder in the image: end it with a slash to put something into it", f)
		}
	}
	r, w := io.Pipe()
	written := make(chan error, 1)
	go func() {
		err := t.Write(w, Accounts{Passwd: parts[0], Group: parts[1]}, there)
		w.CloseWithError(err)
		written <- err
	}()
	err = m.Guest.Run(ctx, guest.Command{Args: m.sh("umask 0; exec tar -xpf - -C / 2>&1"), Stdin: r, Stdout: out, Stderr: out})
	r.CloseWithError(io.ErrClosedPipe)
	if werr := <-written; werr != nil && !errors.Is(werr, io.ErrClosedPipe) {
		return werr // what the guest says then is that the archive is cut off
	}
	return err
}

// settleProgram waits until the guest has done what it does at its first boot. What
// fails of that is not for the steps to report.
const settleProgram = guest.CloudInitEnds + `if [ -d /run/systemd/system ]; then timeout 120 systemctl is-system-running --wait; fi >/dev/null 2>&1
:`

// settleTime bounds what a guest that no longer answers costs: one that does gives up earlier
// by itself, after ten minutes for cloud-init and two for systemd.
const settleTime = 13 * time.Minute

// silentError says that a guest did not answer.
type silentError struct{ limit time.Duration }

func (e *silentError) Error() string {
	return "the guest stopped answering; lab waited " + brief(e.limit)
}

// noRootError says that nothing can be run as root.
type noRootError struct{ user, said string }

func (e *noRootError) Error() string {
	return fmt.Sprintf("the user %q cannot become root there: %s", e.user, e.said)
}

// Hint is the next step.
func (e *noRootError) Hint() string {
	return fmt.Sprintf("a step needs sudo without a password for the user %q, or \"user: root\" in the Labfile", e.user)
}

// Settle waits until the machine has booted as far as it will, for settleTime at most: a
// package manager that is still busy would make a step fail. It is the first that is run as root.
//
// Errors: *silentError, *noRootError, those of the login, ctx's cause.
func (m *Machine) Settle(ctx context.Context) error {
	limit, cancel := context.WithTimeoutCause(ctx, settleTime, &silentError{settleTime})
	defer cancel()
	said := &lines{tell: func(string) {}}
	err := m.Guest.Run(limit, guest.Command{Args: m.sh(settleProgram), Stdout: said, Stderr: said})
	said.end()
	var (
		silent *silentError
		exit   *guest.ExitError
	)
	switch {
	case err == nil || ctx.Err() != nil:
		return err
	case errors.As(context.Cause(limit), &silent):
		return silent
	case m.Sudo && errors.As(err, &exit) && exit.Signal == "": // the program itself always succeeds
		f := said.failed(err)
		return &noRootError{m.User, cmp.Or(strings.Join(f.Output, "; "), f.Error())}
	}
	return err
}

//go:embed clean.sh
var cleanProgram string

// Clean removes what only this machine should have: identity, keys, leases, logs,
// histories. With more to come, it puts aside what Restore brings back.
func (m *Machine) Clean(ctx context.Context, more bool) error {
	mode := "last"
	if more {
		mode = "keep"
	}
	return m.clean(ctx, mode, "removing the traces of the machine")
}

// Restore brings back what Clean put aside.
func (m *Machine) Restore(ctx context.Context) error {
	return m.clean(ctx, "restore", "going on after a step")
}

func (m *Machine) clean(ctx context.Context, mode, doing string) error {
	var out bytes.Buffer
	key := strings.Join(strings.Fields(m.Key)[:min(2, len(strings.Fields(m.Key)))], " ")
	err := m.Guest.Run(ctx, guest.Command{Args: m.sh(cleanProgram, mode, key, m.Hostname), Stdout: &out, Stderr: &out})
	if err != nil {
		if text := strings.TrimSpace(out.String()); text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		return fmt.Errorf("%s: %w", doing, err)
	}
	return nil
}

// What is kept of a step's output.
const (
	tailLines = 20
	maxLine   = 4096
)

// lines tells a stream line by line and keeps the last ones. A carriage return ends
// a line, too: progress bars draw with it.
type lines struct {
	tell func(string)
	mu   sync.Mutex
	part []byte
	last []string
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range b {
		switch {
		case c == '\n' || c == '\r':
			l.line()
		case len(l.part) < maxLine:
			l.part = append(l.part, c)
		}
	}
	return len(b), nil
}

// line is called with mu held.
func (l *lines) line() {
	text := strings.TrimRight(string(l.part), " \t")
	l.part = l.part[:0]
	if text == "" {
		return
	}
	l.last = append(l.last, text)
	if len(l.last) > tailLines {
		l.last = slices.Delete(l.last, 0, len(l.last)-tailLines)
	}
	l.tell(text)
}

func (l *lines) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.line()
}
