// SPDX-License-Identifier: Apache-2.0

package filestream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Serve answers one request: what lab-agent runs, as the user and in the user's home.
// What fails there is told to the host; the error returned is of the stream itself.
func Serve(ctx context.Context, in io.Reader, out io.Writer) error {
	d := NewDecoder(in)
	q, err := d.Request()
	if err != nil {
		return err
	}
	e := NewEncoder(out)
	switch q.Op {
	case Put:
		err = put(ctx, d, q)
		return e.End(Outcome{Failure: failure(err)})
	case Get:
		s := &Sender{Encoder: e}
		err = get(ctx, s, q)
		return e.End(Outcome{Failure: failure(err), Skipped: s.Skipped, Vanished: s.Vanished})
	}
	return e.End(Outcome{Failure: &Failure{What: Other, Text: fmt.Sprintf("no such request: %q", q.Op)}})
}

// HomePath makes a path of one that may begin with "~" for the working directory.
func HomePath(p string) string {
	if p == "~" || p == "" {
		return "."
	}
	if rest, ok := strings.CutPrefix(p, "~/"); ok {
		if rest = strings.TrimLeft(rest, "/"); rest == "" {
			return "."
		}
		return rest
	}
	return p
}

func put(ctx context.Context, d *Decoder, q Request) error {
	target := HomePath(q.Target)
	fi, err := os.Stat(target)
	there := err == nil && fi.IsDir()
	if there && q.Stream {
		return &Failure{What: IsFolder, Path: q.Target}
	}
	r := &Receiver{Decoder: d, Where: func(e Entry) (Place, error) {
		at := Place{Tree: Plain("")}
		switch {
		case e.Name == Contents || !there && !q.Into:
			at.Name = target
		case !there:
			return at, &Failure{What: NoFolder, Path: q.Target}
		default:
			at.Name = filepath.Join(target, e.Name)
		}
		if e.Kind == Dir {
			return mkdir(at, e.Name == Contents)
		}
		return through(ctx, at)
	}}
	o, err := r.Receive(ctx)
	if err == nil && o.Failure != nil { // of the host's side, which knows it
		err = o.Failure
	}
	return err
}

// mkdir makes a folder that was named, unless it is there. One of which only the
// contents are meant stays as it is then.
func mkdir(at Place, contents bool) (Place, error) {
	err := at.Tree.Mkdir(at.Name, 0o700)
	switch {
	case errors.Is(err, fs.ErrExist):
		at.Keep = contents
		return at, isFolder(at)
	case errors.Is(err, fs.ErrNotExist):
		return at, &Failure{What: NoFolder, Path: filepath.Dir(at.Name)}
	}
	return at, err
}

// through opens what a file that was named cannot take the place of: a device, a pipe,
// whatever else is no ordinary file.
func through(ctx context.Context, at Place) (Place, error) {
	fi, err := at.Tree.Stat(at.Name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if fi, err := os.Stat(filepath.Dir(at.Name)); err != nil || !fi.IsDir() {
			return at, &Failure{What: NoFolder, Path: filepath.Dir(at.Name)}
		}
		return at, nil
	case err != nil || fi.Mode().IsRegular() || fi.IsDir():
		return at, err
	}
	at.At, err = OpenWait(ctx, at.Name, os.O_WRONLY)
	return at, err
}

func get(ctx context.Context, s *Sender, q Request) error {
	var all []string
	for _, src := range q.Sources {
		found, err := Expand(HomePath(src))
		if err != nil {
			return err
		}
		all = append(all, found...)
	}
	if err := s.Entry(Entry{Kind: Count, Size: int64(len(all))}); err != nil {
		return err
	}
	for _, path := range all {
		if err := s.Send(ctx, path); err != nil {
			return err
		}
	}
	return nil
}

// Expand returns what a path or pattern names: what is called exactly so, or else all
// that match, but for those whose names begin with a dot where the pattern does not say
// one. The result is not empty.
func Expand(pattern string) ([]string, error) {
	if _, err := os.Lstat(pattern); err == nil || !strings.ContainsAny(pattern, "*?[") {
		return []string{pattern}, noFileOr(pattern, err)
	}
	found, err := filepath.Glob(pattern)
	if err != nil {
		return nil, fmt.Errorf("the pattern %s: %w", pattern, err)
	}
	return Visible(pattern, found)
}

func noFileOr(path string, err error) error {
	if err != nil {
		return noFile(path, err)
	}
	return nil
}

// Visible drops what a shell's pattern would not match: names that begin with a dot.
//
// Errors: a *Failure if nothing is left.
func Visible(pattern string, found []string) ([]string, error) {
	want := strings.Split(pattern, "/")
	var kept []string
	for _, f := range found {
		parts := strings.Split(f, "/")
		hidden := false
		for i, p := range parts {
			hidden = hidden || i < len(want) && strings.HasPrefix(p, ".") && !strings.HasPrefix(want[i], ".")
		}
		if !hidden {
			kept = append(kept, f)
		}
	}
	if len(kept) == 0 {
		return nil, &Failure{What: NoFile, Path: pattern}
	}
	return kept, nil
}
