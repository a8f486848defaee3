// SPDX-License-Identifier: Apache-2.0

package build

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/labfile/lab/internal/program"
)

// epoch is the time that stands in everything a build makes (2024-01-01), in
// place of the time it was made at.
const epoch = 1704067200

// manifestName is where a build that only unpacks packages lists them.
const manifestName = ".lab-packages"

// debootstrap is one run of mmdebstrap: a root directory as a tar.
type debootstrap struct {
	Mode      string // --mode: "root" or "unshare"
	Suite     string
	Variant   string
	Packages  []string
	Exclude   []string // dpkg path-exclude
	Include   []string // dpkg path-include
	Customize []string // hooks: run by the host's sh, the root directory being $1
	Mirror    string   // empty for mmdebstrap's own
}

// argv returns the arguments of mmdebstrap, its name left out; the tar goes to
// standard output.
func (d debootstrap) argv() []string {
	packages := slices.Clone(d.Packages)
	slices.Sort(packages)
	a := []string{
		"--mode=" + d.Mode,
		"--variant=" + d.Variant,
		"--format=tar",
		"--verbose",
		"--include=" + strings.Join(slices.Compact(packages), ","),
	}
	// The order of dpkg's path filters matters: the last that matches decides.
	for _, p := range d.Exclude {
		a = append(a, "--dpkgopt=path-exclude="+p)
	}
	for _, p := range d.Include {
		a = append(a, "--dpkgopt=path-include="+p)
	}
	if d.Variant == "extract" {
		// Nothing is installed, so dpkg's database can't tell what is there.
		a = append(a, `--extract-hook=for deb in "$1"/var/cache/apt/archives/*.deb; do dpkg-deb --show --showformat='${Package}=${Version}\n' "$deb" || exit 1; done >"$1/`+manifestName+`"`)
	}
	hook := "--customize-hook="
	if d.Variant == "extract" {
		hook = "--extract-hook=" // the last that mmdebstrap calls here
	}
	for _, c := range d.Customize {
		a = append(a, hook+c)
	}
	a = append(a, d.Suite, "-")
	if d.Mirror != "" {
		a = append(a, mirrors(d.Mirror, d.Suite)...)
	}
	return a
}

// mirrors returns the sources of a suite below one mirror, which is laid out as
// Debian's own: /debian and /debian-security. A mirror given as an apt source line
// or a file of them is taken as it is.
func mirrors(mirror, suite string) []string {
	if strings.HasPrefix(mirror, "deb ") || strings.HasPrefix(mirror, "/") {
		return []string{mirror}
	}
	base := strings.TrimSuffix(strings.TrimSuffix(mirror, "/"), "/debian")
	return []string{
		fmt.Sprintf("deb %s/debian %s main", base, suite),
		fmt.Sprintf("deb %s/debian %s-updates main", base, suite),
		fmt.Sprintf("deb %s/debian-security %s-security main", base, suite),
	}
}

// run starts mmdebstrap and hands its tar to read. When ctx ends, mmdebstrap is
// asked to stop and to remove its temporary directory, made below tmp.
func (d debootstrap) run(ctx context.Context, tmp string, log func(line string), read func(io.Reader) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "mmdebstrap", d.argv()...)
	cmd.Env = append(environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch), "TMPDIR="+tmp)
	// A group of its own: Ctrl-C on the terminal reaches us, and we tell mmdebstrap once.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	defer program.Tie(cmd, syscall.SIGTERM)() // so that it removes what it made
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting mmdebstrap: %w", err)
	}
	said := make(chan []string, 1)
	go func() { said <- follow(stderr, log) }()
	readErr := read(stdout)
	if readErr != nil {
		cancel()
	} else if _, err := io.Copy(io.Discard, stdout); err != nil {
		readErr = err
	}
	tail := <-said
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil && readErr == nil:
		return fmt.Errorf("running mmdebstrap: %w", context.Cause(ctx))
	case err != nil && !errors.Is(err, context.Canceled):
		return &ToolError{Argv: append([]string{"mmdebstrap"}, d.argv()...), Err: err, Output: strings.Join(tail, "\n")}
	case readErr != nil:
		return fmt.Errorf("reading the tar of mmdebstrap: %w", readErr)
	}
	return nil
}

// follow passes every line of r to log and returns the last ones that tell of
// trouble, or the last ones at all.
func follow(r io.Reader, log func(string)) []string {
	const keep = 12
	var tail, bad []string
	s := bufio.NewScanner(r)
	s.Split(scanLines)
	for s.Scan() {
		line := strings.TrimSpace(s.Text())
		if line == "" {
			continue
		}
		log(line)
		tail = append(tail, line)[max(0, len(tail)+1-keep):]
		if strings.HasPrefix(line, "E:") || strings.Contains(line, "rror:") {
			bad = append(bad, line)[max(0, len(bad)+1-keep):]
		}
	}
	if len(bad) > 0 {
		return bad
	}
	return tail
}

// scanLines splits at line feeds and carriage returns alike: apt's progress knows
// only the latter.
func scanLines(data []byte, atEOF bool) (int, []byte, error) {
	for i, c := range data {
		if c == '\n' || c == '\r' {
			return i + 1, data[:i], nil
		}
	}
	if atEOF && len(data) > 0 {
		return len(data), data, nil
	}
	if len(data) > 32<<10 { // a line that long is not for people
		return len(data), data[:1024], nil
	}
	return 0, nil, nil
}

// environ is the environment of the tools: the user's, in English, with the
// directories that hold file system tools.
func environ() []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "LC_") || strings.HasPrefix(v, "LANG") ||
			strings.HasPrefix(v, "PATH=") || strings.HasPrefix(v, "TMPDIR=")
	})
	return append(env, "LC_ALL=C.UTF-8", "PATH="+os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin")
}

// ToolError says that a program the build runs did not succeed.
type ToolError struct {
	Argv   []string
	Err    error
	Output string // the end of what it printed
}

func (e *ToolError) Error() string {
	s := fmt.Sprintf("running %s: %v", e.Argv[0], e.Err)
	if e.Output != "" {
		s += ":\n" + e.Output
	}
	return s
}

// Unwrap returns what running the program gave.
func (e *ToolError) Unwrap() error { return e.Err }

// Hint is the next step for the user; empty if there is none to tell.
func (e *ToolError) Hint() string {
	if e.Argv[0] != "mmdebstrap" {
		return ""
	}
	return "if no mirror of Debian can be reached, set " + MirrorEnv + " to one that can"
}

var (
	installing = regexp.MustCompile(`(\d+) (?:upgraded, (\d+) )?newly installed`)
	unpacking  = regexp.MustCompile(`^(Unpacking|Setting up) `)
)

// counter turns what mmdebstrap prints into progress: of n packages, each is
// unpacked and set up.
type counter struct{ done, total int }

// line takes a line and reports whether the count moved.
func (c *counter) line(s string) bool {
	if m := installing.FindStringSubmatch(s); m != nil {
		n, err := strconv.Atoi(m[len(m)-1])
		if err != nil || m[2] == "" {
			n, err = strconv.Atoi(m[1])
		}
		if err == nil {
			c.total += 2 * n
		}
		return false
	}
	if unpacking.MatchString(s) {
		c.done++
		return true
	}
	return false
}
