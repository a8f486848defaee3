// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// OpenLog opens a log of the present or last run: the console's, which libvirt has
// written to the generation's directory, or libvirt's own about QEMU.
func (p *Provider) OpenLog(ctx context.Context, g lab.Generation, l providers.Log) (io.ReadCloser, error) {
	r, err := p.openLog(ctx, g, l)
	if err != nil {
		return nil, fmt.Errorf("opening the %s log of machine %q: %w", l, g, err)
	}
	return r, nil
}

func (p *Provider) openLog(ctx context.Context, g lab.Generation, l providers.Log) (io.ReadCloser, error) {
	if err := p.enter(ctx, g); err != nil {
		return nil, err
	}
	dir := p.dir(g)
	switch l {
	case providers.LogConsole:
		return local.OpenLog(dir, filepath.Join(dir, local.FileConsole))
	case providers.LogHypervisor:
		name := domainName(g)
		var created time.Time
		if d, ok, err := p.find(ctx, g); err != nil {
			return nil, err
		} else if ok {
			name = d.Name
			if def, err := d.definition(); err == nil {
				created = def.Created
			}
		}
		return openHypervisor(dir, p.logOf(name), created)
	}
	return nil, errors.New("there is no such log")
}

// logOf is where libvirt writes about the domain called name.
func (p *Provider) logOf(name string) string {
	return filepath.Join(p.logs, name+".log")
}

// logDir is where the daemon at that address writes about its domains.
func logDir(a address, env func(string) string) string {
	if a.session {
		return filepath.Join(cacheDir(env), "libvirt", "qemu", "log")
	}
	return "/var/log/libvirt/qemu"
}

// openHypervisor opens the daemon's log at path about the generation in dir, made at
// that time. What is older than that is of an earlier one of the same name, whose log its
// user could not remove.
func openHypervisor(dir, path string, created time.Time) (io.ReadCloser, error) {
	f, err := os.Open(path)
	if err == nil {
		f.Close()
	}
	if errors.Is(err, os.ErrPermission) {
		if fi, e := os.Stat(path); e != nil || !fi.ModTime().Before(created) {
			return nil, &errPrivate{path, err}
		}
		path = os.DevNull
	}
	return local.OpenLog(dir, path)
}

// errPrivate is of a log that only root may read.
type errPrivate struct {
	path string
	err  error
}

func (e *errPrivate) Error() string {
	return "the system's libvirt keeps it for root: " + e.err.Error()
}

// Hint is the next step.
func (e *errPrivate) Hint() string { return fmt.Sprintf("\"sudo cat %s\" shows it", quote(e.path)) }

func (e *errPrivate) Unwrap() error { return e.err }

// removeLog removes libvirt's log of a domain that is no more: libvirt itself keeps
// it for ever. The system's is root's to remove.
func (p *Provider) removeLog(name string) {
	if p.client != "" {
		return // it is on another host
	}
	logs, err := filepath.Glob(p.logOf(name) + "*") // virtlogd numbers those that have grown long
	if err != nil {
		return
	}
	for _, path := range logs {
		if err := os.Remove(path); err != nil {
			p.log.Debug("removing a log", "error", err)
		}
	}
}

// lastWords returns a function that finds the last line that QEMU itself printed in
// its last run and that is no warning.
func (p *Provider) lastWords(name string) func() string {
	return func() string {
		b, err := local.ReadTail(p.logOf(name), 16<<10)
		if err != nil {
			return ""
		}
		return lastWords(b)
	}
}

// lastWords reads libvirt's log: about each run, the command that it ran, what QEMU
// printed and why it ended.
func lastWords(log []byte) string {
	said := ""
	for line := range bytes.Lines(log) {
		line = bytes.TrimSpace(line)
		_, text, ok := bytes.Cut(line, []byte("qemu-system-x86_64: "))
		switch {
		case bytes.Contains(line, []byte(": starting up libvirt version")):
			said = "" // of the run before
		case !ok, bytes.HasPrefix(text, []byte("warning:")), bytes.HasPrefix(text, []byte("terminating on signal")):
		default:
			said = string(text)
		}
	}
	return said
}

// TrimLogs shortens the logs. Where virtlogd writes them, it has done that already.
func (p *Provider) TrimLogs(ctx context.Context, g lab.Generation, limit lab.Bytes) error {
	err := p.enter(ctx, g)
	if err == nil {
		dir := p.dir(g)
		err = local.TrimLogs(ctx, dir, int64(limit), filepath.Join(dir, local.FileConsole))
	}
	if err != nil {
		return fmt.Errorf("trimming the logs of machine %q: %w", g, err)
	}
	return nil
}
