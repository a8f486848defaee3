// SPDX-License-Identifier: Apache-2.0

package build

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/labfile/lab/internal/program"
)

// ErrIncapable says that this host cannot build boxes. Errors that wrap it are of
// type *IncapableError.
var ErrIncapable = errors.New("this host cannot build boxes")

// IncapableError says what a build lacks, and what cures it.
type IncapableError struct {
	Missing string
	Cure    string // a command or step
}

func (e *IncapableError) Error() string { return fmt.Sprintf("%v: %s", ErrIncapable, e.Missing) }

// Unwrap makes errors.Is(err, ErrIncapable) hold.
func (e *IncapableError) Unwrap() error { return ErrIncapable }

// Hint is the next step for the user.
func (e *IncapableError) Hint() string { return e.Cure + "; or " + Alternatives }

// Alternatives is the hint for a host that can't be cured.
const Alternatives = "use a cloud image (from: https://… with a checksum), or a box that was built elsewhere"

// needs are the programs of a build and the Debian packages that have them.
var needs = []struct{ program, pkg string }{
	{"mmdebstrap", "mmdebstrap"},
	{"dpkg-deb", "dpkg"},
	{"apt-get", "apt"},
	{"mke2fs", "e2fsprogs"},
	{"debugfs", "e2fsprogs"},
	{"qemu-img", "qemu-utils"},
}

const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// Check finds out whether this host can build boxes, without building any. The
// error is an *IncapableError, or ctx's.
func Check(ctx context.Context) error {
	_, err := mode(ctx, os.Getuid(), "/etc")
	return err
}

// mode checks the host and returns how mmdebstrap gets its root: "root" or
// "unshare". etc is where subuid and subgid are.
func mode(ctx context.Context, uid int, etc string) (string, error) {
	for _, n := range needs {
		if _, err := program.Look(n.program); err != nil {
			return "", &IncapableError{n.program + " is not installed", "apt-get install " + n.pkg}
		}
	}
	if _, err := os.Stat(keyring); err != nil {
		return "", &IncapableError{"the keys that sign Debian's packages are not installed", "apt-get install debian-archive-keyring"}
	}
	if err := checkE2fsprogs(ctx); err != nil {
		return "", err
	}
	if uid == 0 {
		return "root", nil
	}
	for _, p := range []string{"newuidmap", "newgidmap", "unshare"} {
		if _, err := program.Look(p); err != nil {
			return "", &IncapableError{p + " is not installed", "apt-get install uidmap util-linux"}
		}
	}
	name := strconv.Itoa(uid)
	if u, err := user.LookupId(name); err == nil {
		name = u.Username
	}
	for _, f := range []string{"subuid", "subgid"} {
		if !subordinate(filepath.Join(etc, f), name, strconv.Itoa(uid)) {
			return "", &IncapableError{
				fmt.Sprintf("user %s has no 65536 subordinate ids in %s", name, filepath.Join(etc, f)),
				fmt.Sprintf("sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s", name),
			}
		}
	}
	if _, err := tool(ctx, "/", "unshare", "--user", "--map-root-user", "--mount", "true"); err != nil {
		if ctx.Err() != nil {
			return "", err
		}
		return "", &IncapableError{
			"users may not make user namespaces here",
			"sudo sysctl kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0 (whichever exists), or build as root",
		}
	}
	return "unshare", nil
}

// subordinate reports whether a file in the format of subuid(5) gives 65536 ids to
// a user, by name or number.
func subordinate(file, name, uid string) bool {
	b, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	s := bufio.NewScanner(bytes.NewReader(b))
	for s.Scan() {
		f := strings.Split(s.Text(), ":")
		if len(f) != 3 || f[0] != name && f[0] != uid {
			continue
		}
		if n, err := strconv.Atoi(f[2]); err == nil && n >= 65536 {
			return true
		}
	}
	return false
}

var e2fsVersion = regexp.MustCompile(`mke2fs (\d+)\.(\d+)`)

// checkE2fsprogs wants 1.47, the first that can be told a disk is zeros.
func checkE2fsprogs(ctx context.Context) error {
	out, err := tool(ctx, "/", "mke2fs", "-V")
	if err != nil {
		return err
	}
	m := e2fsVersion.FindStringSubmatch(out)
	if m == nil {
		return fmt.Errorf("mke2fs -V printed no version but %q", out)
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	if major < 1 || major == 1 && minor < 47 {
		return &IncapableError{fmt.Sprintf("e2fsprogs is %s.%s, and boxes need 1.47", m[1], m[2]), "upgrade e2fsprogs"}
	}
	return nil
}

// tool runs a program to its end and returns what it printed on standard error.
func tool(ctx context.Context, dir, name string, args ...string) (string, error) {
	path, err := program.Look(name)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = dir
	cmd.Env = append(environ(), fmt.Sprintf("E2FSPROGS_FAKE_TIME=%d", epoch))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := program.Run(cmd); err != nil {
		if ctx.Err() != nil {
			return "", fmt.Errorf("running %s: %w", name, context.Cause(ctx))
		}
		return "", &ToolError{Argv: append([]string{name}, args...), Err: err, Output: strings.TrimSpace(stderr.String())}
	}
	return stderr.String(), nil
}
