// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
)

// Found is the lab of a Labfile.
type Found struct {
	ID   lab.ID
	From string // the Labfile's path before its folder was moved, for TakeOver to note the new one; empty if it was not

	// Lost are labs of the same name whose Labfile is gone, if there is no lab yet: one of
	// them may be meant.
	Lost []LostLab
}

// LostLab is a lab whose Labfile is gone.
type LostLab struct {
	ID   lab.ID
	File string
}

// Find returns the lab of the Labfile at file, an absolute path without symbolic links,
// called name. As long as the folder is not moved, its path tells the lab. A folder that
// was moved still has its lab: it has the same device, inode and time of birth as before,
// and the folder at the old path does not. A copy, a clone or a folder on another disk has
// a lab of its own. Find changes nothing.
func (h *Host) Find(name, file string) (Found, error) {
	var f Found
	for n := 0; ; n++ {
		f.ID = lab.NthID(name, file, n)
		o, ok, err := h.Lab(f.ID).origin()
		if err != nil {
			return f, err
		}
		if !ok { // perhaps machines are all that is left of it
			break
		}
		if o.File == file || o.File == "" {
			return f, nil
		}
		// It was moved away from here, or adopted elsewhere.
	}
	return h.findMoved(f, name, file)
}

// findMoved looks for the lab of a Labfile whose path tells none. It returns f, with the
// labs that may be meant, if there is no other.
func (h *Host) findMoved(f Found, name, file string) (Found, error) {
	entries, err := os.ReadDir(h.Dirs.Labs())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	here := folderOf(file)
	for _, e := range entries {
		id := lab.ID(e.Name())
		o, ok, err := h.Lab(id).origin()
		if err != nil || !ok || o.Name != name {
			continue // what is wrong with another lab does not matter here
		}
		if o.File == file {
			return Found{ID: id}, nil
		}
		if filepath.Base(o.File) != filepath.Base(file) || f.From != "" {
			continue
		}
		if moved(o, here) {
			f = Found{ID: id, From: o.File} // but one that was made from this very path goes first
		} else if _, err := os.Lstat(o.File); errors.Is(err, fs.ErrNotExist) {
			f.Lost = append(f.Lost, LostLab{id, o.File})
		}
	}
	return f, nil
}

// moved reports whether a folder is the one that a lab was made from, moved to another
// path. It is not known where the file system does not say when a folder was born: a free
// inode is used again at once.
func moved(o ledger.Opened, here ledger.Folder) bool {
	return here.Born != 0 && here == o.Folder && folderOf(o.File) != here
}

// folderOf returns what tells the folder of a Labfile from others; zero if that is not
// known.
func folderOf(file string) ledger.Folder {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, filepath.Dir(file), 0, unix.STATX_INO|unix.STATX_BTIME, &st)
	if err != nil {
		return ledger.Folder{}
	}
	f := ledger.Folder{Device: unix.Mkdev(st.Dev_major, st.Dev_minor), Inode: st.Ino}
	if st.Mask&unix.STATX_BTIME != 0 && st.Btime.Sec != 0 {
		f.Born = time.Unix(st.Btime.Sec, int64(st.Btime.Nsec)).UnixNano()
	}
	return f
}

// Taken is what TakeOver did.
type Taken struct {
	From   string     // the path of the Labfile before; empty if that is not known
	Mounts []lab.Name // machines that have folders mounted which moved: they see them again from their next start on
}

// TakeOver makes the lab that of the Labfile at file, called name, whatever it was made
// from, because of command, which the user typed. Errors: ErrNoLab; *TakenError if the
// Labfile has another lab.
func (l *Lab) TakeOver(name, file, command string) (Taken, error) {
	var t Taken
	o, known, err := l.origin()
	if err != nil {
		return t, err
	}
	if !l.exists() {
		return t, ErrNoLab
	}
	own, err := l.host.Find(name, file)
	if err != nil {
		return t, err
	}
	if own.ID != l.id && l.host.Lab(own.ID).exists() {
		return t, &TakenError{Lab: own.ID}
	}
	if known {
		t.From = o.File
	}
	same := moved(o, folderOf(file))
	o.Name, o.File, o.Folder = name, file, folderOf(file)
	if !l.book.Exists() { // it was destroyed, but not its volumes
		return t, l.writeOrigin(o)
	}
	if _, err = l.book.Append(ledger.Record{Type: ledger.LabOpened, Command: command}, o); err == nil && same {
		t.Mounts, err = l.moveMounts(filepath.Dir(t.From), filepath.Dir(file), command)
	}
	return t, err
}

// moveMounts records of the machines' mounts that lie in a folder which was moved where
// they are now, and returns the machines that have any. They are the same folders as
// before, so that is no reason to replace a machine.
func (l *Lab) moveMounts(from, to, command string) ([]lab.Name, error) {
	state, err := l.read()
	if err != nil {
		return nil, nil // a damaged ledger: "lab destroy" copes with it
	}
	var names []lab.Name
	for _, name := range state.Names() {
		m := state.Machines[name]
		spec, changed := m.Create.Spec.Machine(name), false
		for i, mount := range spec.Mounts {
			if rel, err := filepath.Rel(from, mount.From); err == nil && filepath.IsLocal(rel) {
				spec.Mounts[i].From, changed = filepath.Join(to, rel), true
			}
		}
		if !changed {
			continue
		}
		names = append(names, name)
		if err := l.note(ledger.MachineChanged, m, command, ledger.Changed{Spec: ledger.SpecOf(spec), Ports: m.Ports}); err != nil {
			return names, err
		}
	}
	return names, nil
}

// exists reports whether there is a ledger of the lab, or volumes.
func (l *Lab) exists() bool {
	kept, err := l.volumes().Names()
	return l.book.Exists() || err == nil && len(kept) > 0
}

// TakenError says that a Labfile has a lab already.
type TakenError struct{ Lab lab.ID }

// Error implements error.
func (e *TakenError) Error() string { return fmt.Sprintf("this Labfile has a lab already: %s", e.Lab) }

// Hint is the next step.
func (e *TakenError) Hint() string {
	return fmt.Sprintf("\"lab destroy --lab %s --volumes\" removes that one with all its data; or \"--name NAME\" gives the other a name of its own", e.Lab)
}

// origin returns what the lab was made from, by its ledger or, if it was destroyed, by
// what is kept beside its volumes; ok is false if neither says so.
func (l *Lab) origin() (o ledger.Opened, ok bool, err error) {
	o, ok, err = ledger.Open(l.host.Dirs.Ledger(l.id)).Opened()
	if err != nil || ok {
		return o, ok, err
	}
	b, err := os.ReadFile(l.host.Dirs.Origin(l.id))
	if errors.Is(err, fs.ErrNotExist) {
		return o, false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &o)
	}
	if err != nil {
		return o, false, fmt.Errorf("lab %s: reading what it was made from: %w", l.id, err)
	}
	return o, true, nil
}

// writeOrigin keeps what the lab was made from beside its volumes.
func (l *Lab) writeOrigin(o ledger.Opened) error {
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	return fsutil.WriteFile(l.host.Dirs.Origin(l.id), append(b, '\n'), 0o600)
}

// forget removes what is kept beside volumes, once there are none.
func (l *Lab) forget() {
	if l.exists() {
		return
	}
	d := l.host.Dirs
	for _, path := range []string{d.Origin(l.id), d.Runtime(l.id), d.Lab(l.id)} {
		_ = os.Remove(path) // the folder only if it is empty then
	}
}
