// SPDX-License-Identifier: Apache-2.0

// Package dirs knows where lab keeps its files: every path of docs/internals.md
// is made here, so that no two packages disagree about one.
package dirs

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/labfile/lab/internal/lab"
)

// Dirs are the three roots that everything else hangs under. All are absolute.
type Dirs struct {
	Data  string // $XDG_DATA_HOME/lab: boxes, ledgers, disks
	Run   string // $XDG_RUNTIME_DIR/lab: sockets and locks only
	Cache string // $XDG_CACHE_HOME/lab: what can be computed again
}

// A unix socket path has 107 bytes (unix(7)). maxRun bounds len(Run), and
// maxSocketName what of a machine's name stands in "/<lab id>/<machine>-<generation>.<kind>"
// below it; a lab ID has at most lab.MaxID bytes.
const (
	maxRun        = 38
	maxSocketName = 24
)

// FromEnv reads the XDG Base Directory variables (specification 0.8) and falls
// back to their defaults. Without an XDG_RUNTIME_DIR of the user's, or with one too
// long for socket paths, Run is a directory under /tmp that belongs to the user; it is
// an error if somebody else owns that.
func FromEnv(getenv func(string) string) (Dirs, error) {
	home := getenv("HOME")
	pick := func(env, fallback string) (string, error) {
		if v := getenv(env); filepath.IsAbs(v) {
			return filepath.Join(v, "lab"), nil
		}
		if home == "" {
			return "", fmt.Errorf("neither %s nor HOME is set", env)
		}
		return filepath.Join(home, fallback, "lab"), nil
	}
	data, err := pick("XDG_DATA_HOME", ".local/share")
	if err != nil {
		return Dirs{}, err
	}
	cache, err := pick("XDG_CACHE_HOME", ".cache")
	if err != nil {
		return Dirs{}, err
	}
	run := filepath.Join(getenv("XDG_RUNTIME_DIR"), "lab")
	if !filepath.IsAbs(run) || len(run) > maxRun || !usable(filepath.Dir(run)) {
		// Two data directories must not meet in one runtime directory.
		sum := sha256.Sum256([]byte(run + "\x00" + data))
		run = filepath.Join("/tmp", fmt.Sprintf("lab-%d-%x", os.Getuid(), sum[:4]))
	}
	if err := own(run); err != nil {
		return Dirs{}, err
	}
	return Dirs{Data: data, Run: run, Cache: cache}, nil
}

// usable reports whether dir is ours or can be made: su(1) and sudo(8) may leave
// somebody else's XDG_RUNTIME_DIR in the environment.
func usable(dir string) bool {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return false
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Getuid()
}

// own makes dir (mode 0700) or checks that it is ours: /tmp is writable by all.
func own(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	fi, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !fi.IsDir() || !ok || int(st.Uid) != os.Getuid() || fi.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s is not a directory of mode 0700 that belongs to user %d", dir, os.Getuid())
	}
	return nil
}

// Boxes is the box store, an OCI image layout.
func (d Dirs) Boxes() string { return filepath.Join(d.Data, "boxes") }

// Layers holds what was baked, one folder per layer.
func (d Dirs) Layers() string { return filepath.Join(d.Data, "layers") }

// Downloads holds what was fetched in part, so that it can be resumed.
func (d Dirs) Downloads() string { return filepath.Join(d.Cache, "downloads") }

// Labs holds one directory per lab.
func (d Dirs) Labs() string { return filepath.Join(d.Data, "labs") }

// Lab is the directory of one lab.
func (d Dirs) Lab(id lab.ID) string { return filepath.Join(d.Labs(), string(id)) }

// SSH holds what "lab ssh-config --install" keeps for the user's ssh: a file per lab.
func (d Dirs) SSH() string { return filepath.Join(d.Data, "ssh") }

// SSHConfig is the lab's file in SSH.
func (d Dirs) SSHConfig(id lab.ID) string { return filepath.Join(d.SSH(), string(id)+".conf") }

// Ledger is the lab's append-only record.
func (d Dirs) Ledger(id lab.ID) string { return filepath.Join(d.Lab(id), "ledger.jsonl") }

// Origin says of a lab that was destroyed where its volumes come from, as its ledger did.
func (d Dirs) Origin(id lab.ID) string { return filepath.Join(d.Lab(id), "origin.json") }

// Keys holds the lab's ssh key and the host keys it made.
func (d Dirs) Keys(id lab.ID) string { return filepath.Join(d.Lab(id), "keys") }

// Machines holds the directories of the lab's generations, as <machine>/<number>.
func (d Dirs) Machines(id lab.ID) string { return filepath.Join(d.Lab(id), "machines") }

// Generation is the directory of one generation: overlay disk, seed and logs.
func (d Dirs) Generation(g lab.Generation) string {
	return filepath.Join(d.Machines(g.Lab), string(g.Machine), strconv.Itoa(g.Number))
}

// Files is the list of what a generation's disk had at its birth, where that can't be
// read from outside.
func (d Dirs) Files(g lab.Generation) string {
	return filepath.Join(d.Lab(g.Lab), "births", fmt.Sprintf("%s@%d.gz", g.Machine, g.Number))
}

// Domains holds the directories of those of the lab's generations that libvirt runs,
// as Machines does: no provider mistakes another's for its own.
func (d Dirs) Domains(id lab.ID) string { return filepath.Join(d.Lab(id), "domains") }

// Domain is the directory of one generation that libvirt runs.
func (d Dirs) Domain(g lab.Generation) string {
	return filepath.Join(d.Domains(g.Lab), string(g.Machine), strconv.Itoa(g.Number))
}

// Volumes holds the lab's volumes, which outlive it.
func (d Dirs) Volumes(id lab.ID) string { return filepath.Join(d.Lab(id), "volumes") }

// Remotes remembers the hosts that images were sent to.
func (d Dirs) Remotes() string { return filepath.Join(d.Data, "remotes") }

// Boot has the scripts of the boot steps of a lab's machines, by the digest of their
// content, in hex.
func (d Dirs) Boot(id lab.ID) string { return filepath.Join(d.Lab(id), "boot") }

// SupervisorLog is what the lab's supervisors said.
func (d Dirs) SupervisorLog(id lab.ID) string { return filepath.Join(d.Lab(id), "supervisor.log") }

// RunLab holds the sockets and locks of one lab: below the runtime directory that the
// lab's folder names, whatever the caller's environment says, or below Run if it names
// none that can be used.
func (d Dirs) RunLab(id lab.ID) string { return filepath.Join(d.runtime(id), string(id)) }

// Socket is a socket of one generation; kind is a word of at most five letters.
// Long machine names are shortened, so that the path fits a unix socket address.
func (d Dirs) Socket(g lab.Generation, kind string) string {
	name := string(g.Machine)
	if len(name) > maxSocketName {
		sum := sha256.Sum256([]byte(name))
		name = fmt.Sprintf("%s~%x", name[:maxSocketName-9], sum[:4])
	}
	return filepath.Join(d.RunLab(g.Lab), fmt.Sprintf("%s-%d.%s", name, g.Number, kind))
}
