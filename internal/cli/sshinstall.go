// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
)

// includeMark stands above the line that "ssh-config --install" adds.
const includeMark = "# machines of lab; \"lab ssh-config --uninstall\" takes this line away"

// installSSH keeps the lab's machines in a file that the user's ssh configuration
// includes, and writes those of the other labs there anew: a short name that two labs
// have is no name of either.
func (a *app) installSSH(ctx context.Context, h *engine.Host, l *engine.Lab) error {
	include, err := includeLine(h.Dirs.SSH())
	if err != nil {
		return err
	}
	if _, err := l.SSHConfig(); err != nil { // ErrNoLab before anything is written
		return err
	}
	unlock, err := lockSSH(ctx, h)
	if err != nil {
		return err
	}
	defer unlock()
	if err := a.writeSSH(h, append(installed(h), l.ID())); err != nil {
		return err
	}
	return a.editSSH(func(old string) string { return addInclude(old, include) })
}

// uninstallSSH takes the lab out of the user's ssh configuration, and the line that
// includes it with the last lab.
func (a *app) uninstallSSH(ctx context.Context, h *engine.Host, id lab.ID) error {
	unlock, err := lockSSH(ctx, h)
	if err != nil {
		return err
	}
	defer unlock()
	if err := os.Remove(h.Dirs.SSHConfig(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the lab's ssh configuration: %w", err)
	}
	rest := installed(h)
	if len(rest) > 0 {
		return a.writeSSH(h, rest)
	}
	include, err := includeLine(h.Dirs.SSH())
	if err != nil {
		return err
	}
	return a.editSSH(func(old string) string { return dropInclude(old, include) })
}

// refreshSSH writes the lab's file anew if it is installed: its machines may be others
// now. A failure is only noted: the command was about something else.
func (a *app) refreshSSH(ctx context.Context, l *engine.Lab) {
	h, err := a.host()
	if err != nil {
		return
	}
	if _, err := os.Stat(h.Dirs.SSHConfig(l.ID())); err != nil {
		return
	}
	a.rewriteSSH(ctx, h)
}

// rewriteSSH writes the files of all installed labs anew: after one was destroyed, its
// short names are those of another.
func (a *app) rewriteSSH(ctx context.Context, h *engine.Host) {
	if len(installed(h)) == 0 {
		return
	}
	unlock, err := lockSSH(ctx, h)
	if err != nil {
		a.ui.Note("%v", err)
		return
	}
	defer unlock()
	if err := a.writeSSH(h, installed(h)); err != nil {
		a.ui.Note("%v", err)
	}
}

// lockSSH waits until no other command writes the files of installed labs, or the user's
// configuration for their sake, and returns what lets the next one do so.
func lockSSH(ctx context.Context, h *engine.Host) (unlock func(), err error) {
	if err := os.MkdirAll(h.Dirs.SSH(), 0o700); err != nil {
		return nil, fmt.Errorf("keeping the ssh configuration: %w", err)
	}
	folder, err := fsutil.LockDir(ctx, h.Dirs.SSH())
	if err != nil {
		return nil, fmt.Errorf("keeping the ssh configuration: %w", err)
	}
	return func() { folder.Close() }, nil
}

// installed returns the labs that are installed.
func installed(h *engine.Host) []lab.ID {
	files, _ := filepath.Glob(filepath.Join(h.Dirs.SSH(), "*.conf"))
	var ids []lab.ID
	for _, f := range files {
		ids = append(ids, lab.ID(strings.TrimSuffix(filepath.Base(f), ".conf")))
	}
	return ids
}

// writeSSH writes the files of the labs, and removes that of one which is gone. The file
// of a lab whose record cannot be read stays as it is, and so do the names in it.
func (a *app) writeSSH(h *engine.Host, ids []lab.ID) error {
	hosts := map[lab.ID][]engine.SSHHost{}
	called := map[string]int{} // how many labs have the short name
	unknown := false           // some lab may have any
	for _, id := range ids {
		if _, again := hosts[id]; again {
			continue
		}
		its, err := h.Lab(id).SSHConfig()
		if errors.Is(err, engine.ErrNoLab) {
			_ = os.Remove(h.Dirs.SSHConfig(id))
			continue
		}
		if err != nil {
			names, err := shortNames(h.Dirs.SSHConfig(id), id)
			if err != nil {
				unknown = true
			}
			for _, name := range names {
				called[name]++
			}
			continue
		}
		hosts[id] = its
		if len(its) > 0 {
			called[its[0].Lab]++
		}
	}
	for id, its := range hosts {
		names := sshNames{short: !unknown && len(its) > 0 && called[its[0].Lab] == 1}
		if err := replaceUserFile(h.Dirs.SSHConfig(id), []byte(a.sshConfig(id, its, names)), 0o600, nil); err != nil {
			return fmt.Errorf("keeping the ssh configuration: %w", err)
		}
	}
	return nil
}

// shortNames returns the names of labs, other than id, by which the installed file of the
// lab calls machines.
func shortNames(path string, id lab.ID) ([]string, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading an installed lab's names: %w", err)
	}
	var names []string
	for _, l := range strings.Split(string(text), "\n") {
		rest, ok := strings.CutPrefix(l, "Host ")
		if !ok {
			continue
		}
		for _, pattern := range strings.Fields(rest) {
			if _, name, ok := strings.Cut(pattern, "."); ok && name != string(id) && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names, nil
}

// errEdited says that a file is not what it was when it was read.
var errEdited = errors.New("the file was changed meanwhile")

// editSSH changes ~/.ssh/config, or leaves it as it is: nobody sees half of it. If
// somebody else changes it meanwhile, it begins again with what they wrote.
func (a *app) editSSH(change func(string) string) error {
	home := a.Getenv("HOME")
	if !filepath.IsAbs(home) {
		return usage("set it to your home directory", "HOME is not set: where your ssh configuration is, is not known")
	}
	path := filepath.Join(home, ".ssh", "config")
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() == fs.ModeSymlink { // a link stays one
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return &hinted{
				fmt.Errorf("%s is a link that leads to no file: %w", path, err),
				"make the file that it leads to, or remove the link",
			}
		}
		path = real
	}
	for range 5 {
		if err := editFile(path, change); !errors.Is(err, errEdited) {
			return err
		}
	}
	return &hinted{fmt.Errorf("writing your ssh configuration: %w, again and again", errEdited), "close what writes " + path + ", then repeat the command"}
}

// editFile is editSSH for one attempt: errEdited if the file was changed meanwhile.
func editFile(path string, change func(string) string) error {
	old, err := os.ReadFile(path)
	mode := fs.FileMode(0o600)
	switch {
	case err == nil:
		fi, err := os.Stat(path)
		if err != nil {
			return fmt.Errorf("reading your ssh configuration: %w", err)
		}
		mode = fi.Mode().Perm()
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("reading your ssh configuration: %w", err)
	}
	changed := change(string(old))
	if changed == string(old) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("writing your ssh configuration: %w", err)
	}
	err = replaceUserFile(path, []byte(changed), mode, func() error {
		now, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if string(now) != string(old) {
			return errEdited
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("writing your ssh configuration: %w", err)
	}
	return nil
}

// includeLine is the line by which ssh reads every file in dir. ssh would take some
// characters of a path for more than themselves.
func includeLine(dir string) (string, error) {
	if strings.ContainsAny(dir, "*?[]{}\"'\\%$~\n\r") {
		return "", usage("redirect \"lab ssh-config\" to a file and use \"ssh -F FILE\"", "ssh cannot include files from %s", dir)
	}
	return "Include \"" + dir + "/*.conf\"", nil
}

// addInclude puts the line at the top of a configuration, before the first Host or
// Match: behind one, it would count for those hosts alone.
func addInclude(config, line string) string {
	for _, l := range strings.Split(config, "\n") {
		l = strings.TrimSpace(l)
		if l == line {
			return config
		}
		word := l
		if end := strings.IndexAny(l, " \t=\""); end >= 0 {
			word = l[:end]
		}
		if strings.EqualFold(word, "Host") || strings.EqualFold(word, "Match") {
			break
		}
	}
	return includeMark + "\n" + line + "\n" + dropInclude(config, line)
}

// dropInclude takes the line away, with the mark above it, and nothing else.
func dropInclude(config, line string) string {
	lines := strings.SplitAfter(config, "\n")
	kept := lines[:0:0]
	for _, l := range lines {
		if strings.TrimSpace(l) != line {
			kept = append(kept, l)
			continue
		}
		if n := len(kept); n > 0 && strings.TrimSpace(kept[n-1]) == includeMark {
			kept = kept[:n-1]
		}
	}
	return strings.Join(kept, "")
}

// replaceUserFile writes a file so that readers see the old or the new, and a full
// disk costs neither. Just before the new one takes the old one's place, it asks check,
// if there is one, and gives up with its error.
func replaceUserFile(path string, data []byte, mode fs.FileMode, check func() error) error {
	d, err := fsutil.NewDraft(path, 0o600)
	if err != nil {
		return err
	}
	defer d.Drop()
	_, err = d.Write(data)
	if err := errors.Join(err, d.Chmod(mode)); err != nil {
		return err
	}
	if check != nil {
		if err := check(); err != nil {
			return err
		}
	}
	return d.Commit()
}
