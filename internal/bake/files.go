// SPDX-License-Identifier: Apache-2.0

package bake

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// Tree is what a file step puts into the guest, as the members of an archive. It is
// made of a lab.Layer's files, and refuses to write others.
type Tree struct {
	members []member
	mode    fs.FileMode // asked for; 0 keeps the host's
	owner   string
	digests map[string]string // as the layer's key was made of
	from    string
}

// member is a file, folder or link, with its path in the guest.
type member struct {
	to   string // absolute
	file hostFile
	text *string // content, instead of file
}

// NewTree reads what a step puts where. Files are relative to dir.
func NewTree(dir string, p lab.Provision, l lab.Layer) (*Tree, error) {
	t := &Tree{owner: p.Owner, digests: l.Files, from: filepath.ToSlash(p.From)}
	if p.Mode != "" {
		mode, err := strconv.ParseUint(p.Mode, 8, 12)
		if err != nil {
			return nil, fmt.Errorf("%q is not an octal mode", p.Mode)
		}
		t.mode = fs.FileMode(mode)
	}
	to := path.Clean(p.To)
	if !path.IsAbs(to) {
		return nil, fmt.Errorf("%q is not an absolute path", p.To)
	}
	if p.Content != nil {
		if strings.HasSuffix(p.To, "/") {
			return nil, fmt.Errorf("%q is a folder, and the content needs the name of a file", p.To)
		}
		t.members = []member{{to: to, text: p.Content}}
		return t, nil
	}
	if strings.HasSuffix(p.To, "/") {
		abs, err := filepath.Abs(filepath.Join(dir, p.From))
		if filepath.IsAbs(p.From) {
			abs, err = filepath.Clean(p.From), nil
		}
		if err != nil {
			return nil, err
		}
		to = path.Join(to, filepath.Base(abs))
	}
	if err := unchanged(dir, p, l); err != nil {
		return nil, err
	}
	err := walk(dir, p.From, false, func(f hostFile) error {
		t.members = append(t.members, member{to: path.Join(to, f.rel), file: f})
		return nil
	})
	return t, err
}

// unchanged reads the files of a step again and compares them with those that the
// layer's key was made of.
func unchanged(dir string, p lab.Provision, l lab.Layer) error {
	m, err := NewKeys(dir).material(p)
	if err != nil {
		return err
	}
	if m.step != l.Step || !maps.Equal(m.files, l.Files) {
		return fmt.Errorf("%s: %w", p, errChanged)
	}
	return nil
}

// Folders returns every folder that the tree needs, the outer ones first: those that
// it brings and those above them.
func (t *Tree) Folders() []string {
	have := map[string]bool{"/": true}
	var list []string
	var add func(string)
	add = func(dir string) {
		if !have[dir] {
			add(path.Dir(dir))
			have[dir] = true
			list = append(list, dir)
		}
	}
	for _, m := range t.members {
		if m.folder() {
			add(m.to)
		} else {
			add(path.Dir(m.to))
		}
	}
	return list
}

// Paths returns what the tree brings besides folders.
func (t *Tree) Paths() []string {
	var list []string
	for _, m := range t.members {
		if !m.folder() {
			list = append(list, m.to)
		}
	}
	return list
}

func (m member) folder() bool { return m.text == nil && m.file.info.IsDir() }

// Accounts are a guest's users and groups.
type Accounts struct {
	Passwd, Group string // contents of the files
}

// find returns the numbers of user and, for users, of their group.
func find(file, name string) (id, group int, ok bool) {
	for line := range strings.Lines(file) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) < 3 || f[0] != name {
			continue
		}
		id, err := strconv.Atoi(f[2])
		if err != nil {
			return 0, 0, false
		}
		if len(f) > 3 {
			group, _ = strconv.Atoi(f[3])
		}
		return id, group, true
	}
	return 0, 0, false
}

// Resolve returns the numbers of an owner: "user:group", "user", or numbers.
func (a Accounts) Resolve(owner string) (uid, gid int, err error) {
	if owner == "" {
		return 0, 0, nil
	}
	user, group, both := strings.Cut(owner, ":")
	if n, err := strconv.ParseUint(user, 10, 31); err == nil {
		uid = int(n)
		if u, g, ok := byNumber(a.Passwd, user); ok {
			uid, gid = u, g
		}
	} else {
		var ok bool
		if uid, gid, ok = find(a.Passwd, user); !ok {
			return 0, 0, fmt.Errorf("the image has no user %q: an earlier step must make it", user)
		}
	}
	if !both {
		return uid, gid, nil
	}
	if n, err := strconv.ParseUint(group, 10, 31); err == nil {
		return uid, int(n), nil
	}
	gid, _, ok := find(a.Group, group)
	if !ok {
		return 0, 0, fmt.Errorf("the image has no group %q: an earlier step must make it", group)
	}
	return uid, gid, nil
}

func byNumber(passwd, number string) (uid, gid int, ok bool) {
	for line := range strings.Lines(passwd) {
		if f := strings.Split(line, ":"); len(f) > 3 && f[2] == number {
			return find(passwd, f[0])
		}
	}
	return 0, 0, false
}

// Write writes the tree as an archive of paths relative to the guest's root. Folders
// that are there already keep owner and mode. An error says which file is no longer
// what the key was made of.
func (t *Tree) Write(w io.Writer, a Accounts, there map[string]bool) error {
	uid, gid, err := a.Resolve(t.owner)
	if err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	brought := map[string]member{}
	for _, m := range t.members {
		if m.folder() {
			brought[m.to] = m
		}
	}
	for _, dir := range t.Folders() {
		if there[dir] {
			continue
		}
		h := &tar.Header{Typeflag: tar.TypeDir, Name: name(dir) + "/", Mode: 0o755, ModTime: time.Now()}
		if m, ok := brought[dir]; ok {
			h.Mode, h.Uid, h.Gid, h.ModTime = int64(t.folderMode(m.file.info)), uid, gid, m.file.info.ModTime()
		}
		if err := tw.WriteHeader(trim(h)); err != nil {
			return err
		}
	}
	for _, m := range t.members {
		if m.folder() {
			continue
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name(m.to), Uid: uid, Gid: gid, Mode: 0o644, ModTime: time.Now()}
		if err := t.member(tw, h, m); err != nil {
			return err
		}
	}
	return tw.Close()
}

// name makes a member's name from a path of the guest.
func name(p string) string { return strings.TrimPrefix(p, "/") }

// trim rounds the time, so that every tar can read the header.
func trim(h *tar.Header) *tar.Header {
	h.ModTime = h.ModTime.Truncate(time.Second)
	h.Format = tar.FormatGNU
	return h
}

// folderMode is the mode asked for, and whoever may read may enter.
func (t *Tree) folderMode(fi fs.FileInfo) fs.FileMode {
	if t.mode == 0 {
		return fi.Mode().Perm()
	}
	return t.mode | t.mode&0o444>>2
}

func (t *Tree) member(tw *tar.Writer, h *tar.Header, m member) error {
	if t.mode != 0 {
		h.Mode = int64(t.mode)
	}
	if m.text != nil {
		h.Size = int64(len(*m.text))
		if err := tw.WriteHeader(trim(h)); err != nil {
			return err
		}
		_, err := io.WriteString(tw, *m.text)
		return err
	}
	f := m.file
	h.ModTime = f.info.ModTime()
	if f.link != "" {
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.link, 0o777
		return tw.WriteHeader(trim(h))
	}
	if t.mode == 0 {
		h.Mode = int64(f.info.Mode().Perm())
	}
	in, err := os.Open(f.path)
	if err != nil {
		return err
	}
	defer in.Close()
	h.Size = f.info.Size()
	if err := tw.WriteHeader(trim(h)); err != nil {
		return err
	}
	d := newDigester(f)
	if _, err := io.CopyN(io.MultiWriter(tw, d), in, h.Size); err != nil {
		if errors.Is(err, io.EOF) {
			err = errChanged
		}
		return fmt.Errorf("%s: %w", f.path, err)
	}
	if want, ok := t.digests[path.Join(t.from, f.rel)]; ok && want != d.sum() {
		return fmt.Errorf("%s: %w", f.path, errChanged)
	}
	return nil
}
