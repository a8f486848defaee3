// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/program"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/accel"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/qmp"
)

// The oldest QEMU that has the stream netdev.
const (
	minMajor = 7
	minMinor = 2
)

// Free space below which the host gets a warning, and an error.
const (
	lowSpace = 5 * lab.GiB
	noSpace  = 512 * lab.MiB
)

// Check looks at QEMU, its sandbox, acceleration, directories and limits.
func (p *Provider) Check(ctx context.Context) ([]providers.Finding, error) {
	var found []providers.Finding
	binary, err := p.binary()
	if err != nil {
		found = append(found, providers.Finding{
			Topic: "qemu", Level: providers.LevelError,
			Detail: p.cfg.Binary + " not found", Cure: installCure(),
		})
	} else {
		found = append(found, checkVersion(ctx, binary), checkSandbox(ctx, binary), p.prober.Check(ctx, binary))
	}
	found = append(found, p.checkImg(ctx), checkKernel())
	found = append(found, p.checkSpace(), p.checkRun(), checkLimits())
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("checking the host: %w", err)
	}
	return found, nil
}

var versionLine = regexp.MustCompile(`version (\d+)\.(\d+)\.(\d+)(?: \(([^)]*)\))?`)

// versionOf asks a QEMU program for its version.
func versionOf(ctx context.Context, binary string) (qmp.Version, error) {
	cmd := exec.CommandContext(ctx, binary, "--version")
	defer program.Tie(cmd, syscall.SIGKILL)()
	out, err := cmd.Output()
	if err != nil {
		return qmp.Version{}, fmt.Errorf("asking %s for its version: %w", binary, err)
	}
	return parseVersion(out)
}

func parseVersion(out []byte) (qmp.Version, error) {
	m := versionLine.FindSubmatch(out)
	if m == nil {
		first, _, _ := bytes.Cut(out, []byte("\n"))
		return qmp.Version{}, fmt.Errorf("no version in %q", first)
	}
	var n [3]int
	for i := range n {
		v, err := strconv.Atoi(string(m[i+1]))
		if err != nil {
			return qmp.Version{}, fmt.Errorf("no version in %q", m[0])
		}
		n[i] = v
	}
	return qmp.Version{Major: n[0], Minor: n[1], Micro: n[2], Package: string(m[4])}, nil
}

func checkVersion(ctx context.Context, binary string) providers.Finding {
	f := providers.Finding{Topic: "qemu", Level: providers.LevelOK}
	v, err := versionOf(ctx, binary)
	switch {
	case err != nil:
		f.Level, f.Detail, f.Cure = providers.LevelError, err.Error(), "reinstall QEMU: "+installCure()
	case !v.AtLeast(minMajor, minMinor):
		f.Level = providers.LevelError
		f.Detail = fmt.Sprintf("%s is QEMU %s, %d.%d is needed", binary, v, minMajor, minMinor)
		f.Cure = "install QEMU from a newer release of your distribution or its backports"
	default:
		f.Detail = fmt.Sprintf("%s, version %s", binary, v)
	}
	return f
}

// checkSandbox has QEMU switch its sandbox on and then list its machine types.
func checkSandbox(ctx context.Context, binary string) providers.Finding {
	f := providers.Finding{Topic: "sandbox", Level: providers.LevelOK, Detail: "QEMU runs under seccomp"}
	cmd := exec.CommandContext(ctx, binary, "-nodefaults", "-no-user-config", "-machine", "none", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny", "-device", "help")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := program.Run(cmd); err != nil {
		f.Level = providers.LevelError
		f.Detail = "QEMU does not run in its seccomp sandbox: " + err.Error()
		if said := accel.LastLine(stderr.String()); said != "" {
			f.Detail = "QEMU does not run in its seccomp sandbox: " + said
		}
		f.Cure = "use a QEMU that is built with seccomp, on a kernel with CONFIG_SECCOMP_FILTER"
	}
	return f
}

func (p *Provider) checkImg(ctx context.Context) providers.Finding {
	f := providers.Finding{Topic: "qemu-img", Level: providers.LevelOK}
	path, err := exec.LookPath(p.cfg.ImgBinary)
	if err != nil {
		f.Level, f.Detail = providers.LevelWarning, p.cfg.ImgBinary+" not found; it is needed to build boxes"
		f.Cure = installCure()
		return f
	}
	v, err := versionOf(ctx, path)
	if err != nil {
		f.Level, f.Detail, f.Cure = providers.LevelWarning, err.Error(), installCure()
		return f
	}
	f.Detail = fmt.Sprintf("%s, version %s", path, v)
	return f
}

func checkKernel() providers.Finding {
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return providers.Finding{
			Topic: "kernel", Level: providers.LevelError, Detail: "pidfd_open: " + err.Error(),
			Cure: "use Linux 5.3 or newer; in a container, a seccomp profile that allows pidfd_open",
		}
	}
	unix.Close(fd)
	return providers.Finding{Topic: "kernel", Level: providers.LevelOK, Detail: "processes can be watched by pidfd"}
}

// existing returns path or the nearest directory above it that exists.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); err == nil || path == filepath.Dir(path) {
			return path
		}
		path = filepath.Dir(path)
	}
}

func (p *Provider) checkSpace() providers.Finding {
	f := providers.Finding{Topic: "disk space", Level: providers.LevelOK}
	data := p.cfg.Dirs.Data
	var st unix.Statfs_t
	if err := unix.Statfs(existing(data), &st); err != nil {
		f.Level, f.Detail = providers.LevelError, data+": "+err.Error()
		return f
	}
	free := lab.Bytes(st.Bavail) * lab.Bytes(st.Bsize)
	f.Detail = fmt.Sprintf("%.1f GiB free for %s", float64(free)/float64(lab.GiB), data)
	if free < lowSpace {
		f.Level, f.Cure = providers.LevelWarning, "free some space, or set XDG_DATA_HOME to a larger file system"
	}
	if free < noSpace {
		f.Level = providers.LevelError
	}
	return f
}

func (p *Provider) checkRun() providers.Finding {
	f := providers.Finding{Topic: "runtime directory", Level: providers.LevelOK, Detail: p.cfg.Dirs.Run}
	if err := unix.Access(existing(p.cfg.Dirs.Run), unix.W_OK|unix.X_OK); err != nil {
		f.Level, f.Detail = providers.LevelError, p.cfg.Dirs.Run+": "+err.Error()
		f.Cure = "set XDG_RUNTIME_DIR to a directory of your own"
	}
	return f
}

func checkLimits() providers.Finding {
	f := providers.Finding{Topic: "limits", Level: providers.LevelOK, Detail: "no limit is in the way"}
	var low []string
	for _, l := range []struct {
		name     string
		resource int
		least    uint64
	}{
		{"open files (ulimit -n)", unix.RLIMIT_NOFILE, 1024},
		{"file size (ulimit -f)", unix.RLIMIT_FSIZE, uint64(64 * lab.GiB)},
		{"address space (ulimit -v)", unix.RLIMIT_AS, uint64(16 * lab.GiB)},
	} {
		var r unix.Rlimit
		if err := unix.Getrlimit(l.resource, &r); err == nil && r.Cur < l.least {
			low = append(low, fmt.Sprintf("%s is %d", l.name, r.Cur))
		}
	}
	if len(low) > 0 {
		f.Level, f.Detail = providers.LevelWarning, strings.Join(low, ", ")
		f.Cure = "raise the limit in the shell that starts lab"
	}
	return f
}

// installCure returns the command that installs QEMU on this host.
func installCure() string { return local.InstallCure(packages) }

// packages has QEMU's packages by distribution.
var packages = local.Packages{
	APT: "qemu-system-x86 qemu-utils", DNF: "qemu-system-x86-core qemu-img", Pacman: "qemu-base",
	Zypper: "qemu-x86 qemu-tools", APK: "qemu-system-x86_64 qemu-img",
	Else: "install QEMU 7.2 or newer (qemu-system-x86_64 and qemu-img) with your package manager",
}
