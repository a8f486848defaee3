// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/labfile/lab/internal/drift"
	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/providers"
)

// listTime bounds what a guest may take to list its files, and maxList how many bytes
// that may be: a million files.
const (
	listTime = 5 * time.Minute
	maxList  = 256 << 20
)

// unreadable says why the disk of what is born from an image can't be read from
// outside; nothing if it can. An image is looked at once.
func (s *session) unreadable(img Image) string {
	if _, ok := s.provider.(providers.DiskReader); !ok {
		return ""
	}
	key := strings.Join(append([]string{img.Disk}, img.Image.Layers...), "\n")
	s.mu.Lock()
	defer s.mu.Unlock()
	why, known := s.looked[key]
	if known {
		return why
	}
	layers := []drift.Layer{{Path: img.Disk, Format: img.Format}}
	for _, path := range img.Image.Layers {
		layers = append(layers, drift.Layer{Path: path, Format: "qcow2"})
	}
	if err := readable(layers); err != nil {
		why = err.Error()
	}
	if s.looked == nil {
		s.looked = map[string]string{}
	}
	s.looked[key] = why
	return why
}

func readable(layers []drift.Layer) error {
	chain, err := drift.OpenChain(layers)
	if err != nil {
		return err
	}
	defer chain.Close()
	view, err := chain.View(chain.Len())
	if err != nil {
		return err
	}
	_, err = drift.OpenRoot(view)
	return err
}

// listBirth keeps a list of the files that a generation has at its birth: its disk,
// which is about to be frozen, will not tell. Without the list the generation is none
// the worse, but for "lab diff".
func (s *session) listBirth(ctx context.Context, target guest.Target, l launch) {
	s.emit(Event{Machine: l.Machine, Generation: l.Number, Stage: StageBirth, Text: "listing its files, since " + l.unreadable})
	err := s.writeList(ctx, target, l.Generation)
	if err != nil && ctx.Err() == nil {
		s.emit(Event{
			Machine: l.Machine, Generation: l.Number, Stage: StageBirth, Err: err,
			Text: fmt.Sprintf("lab diff will have nothing to compare it with: %v", err),
		})
	}
}

func (s *session) writeList(ctx context.Context, target guest.Target, g lab.Generation) error {
	list, err := s.askList(ctx, target)
	if err != nil {
		return err
	}
	if _, err := drift.ReadManifest(bytes.NewReader(list)); err != nil {
		return err
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(list); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	path := s.host.Dirs.Files(g)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return fsutil.WriteFile(path, packed.Bytes(), 0o600)
}

// askList asks a guest for the list of its files.
func (l *Lab) askList(ctx context.Context, target guest.Target) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	dial := target.Port
	target.Port = func(ctx context.Context, port uint16) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, cmp.Or(l.host.Patience, loginTime))
		defer cancel()
		return dial(ctx, port)
	}
	b := &bounded{left: maxList}
	if err := guest.ListFiles(ctx, target, b); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// bounded is a buffer that refuses to grow too large.
type bounded struct {
	bytes.Buffer
	left int
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		return 0, fmt.Errorf("the guest says more than %d bytes of its files", maxList)
	}
	return b.Buffer.Write(p)
}

// NoListError says that files can't be compared, because a disk can't be read from
// outside and nobody else has said what is on it.
type NoListError struct {
	Generation lab.Generation
	Running    bool  // it runs, and what is missing is the list of its birth
	Err        error // why the disk can't be read
}

// Error implements error.
func (e *NoListError) Error() string {
	if e.Running {
		return fmt.Sprintf("%v, and nobody listed the files of %s at its birth", e.Err, e.Generation)
	}
	return fmt.Sprintf("%v, and its guest can't be asked, since %s does not run", e.Err, e.Generation)
}

// Unwrap returns why the disk can't be read.
func (e *NoListError) Unwrap() error { return e.Err }

// Hint is the next step for the user.
func (e *NoListError) Hint() string {
	if e.Running {
		return fmt.Sprintf("\"lab replace %s\" makes a generation whose files are listed; until then, look into the machine with \"lab ssh %s\"", e.Generation.Machine, e.Generation.Machine)
	}
	return fmt.Sprintf("\"lab start %s\", if that is its present generation; two others are compared as they were born: \"lab diff %s@1 %s@2\"", e.Generation.Machine, e.Generation.Machine, e.Generation.Machine)
}

// listedSide is one of two disks of which at least one can't be read from outside.
type listedSide struct {
	disk  *openDisk
	birth bool // as it was at birth
	root  *drift.Root
	err   error // why there is no root

	list *drift.Manifest
	side drift.Side // nil if nobody kept what is in the files
	end  func()

	attendant *attendant // of the machine, if it is asked
}

// diffListed is Diff where a disk can't be read from outside: lists of files are
// compared, which guests made, at birth or now.
func (l *Lab) diffListed(ctx context.Context, o DiffOptions, d Drift, old, now *listedSide) (Drift, error) {
	// What is no file system of another kind is an error like any other, unless the
	// guest was asked at birth already.
	for _, s := range []*listedSide{old, now} {
		var un *drift.UnreadableError
		if s.err != nil && !errors.As(s.err, &un) {
			if _, err := os.Stat(l.host.Dirs.Files(s.disk.g)); err != nil {
				return Drift{}, s.err
			}
		}
	}
	defer func() {
		for _, s := range []*listedSide{old, now} {
			if s.end != nil {
				s.end()
			}
		}
	}()
	err := cmp.Or(now.err, old.err)
	d.Unreadable = err.Error()
	if un := (*drift.UnreadableError)(nil); errors.As(err, &un) {
		d.Unreadable = un.Why
	}
	if m, p, err := l.known(now.disk.g.Machine); err == nil {
		s := &session{Lab: l, provider: p, opt: Options{Events: o.Events}}
		attendant, leave := s.attend(ctx, s.generation(m), Attention{Expected: true})
		defer leave()
		for _, side := range []*listedSide{old, now} {
			side.attendant = attendant
		}
	}
	pair := !old.birth // two generations, of which the birth is better than nothing
	for _, s := range []*listedSide{old, now} {
		if err := l.list(ctx, s, pair); err != nil {
			return Drift{}, err
		}
		name := s.disk.g.String()
		if s.birth {
			name += " at birth"
		}
		if s.root == nil {
			d.Asked = append(d.Asked, name)
		}
		if s == old {
			d.Old = name
		} else {
			d.New = name
		}
	}
	if state, err := l.read(); err == nil {
		o.Options.Proxies = state.Proxied
	}
	d.Report = drift.CompareManifests(old.list, now.list, !pair, o.Options)
	if now.side == nil {
		now.side = drift.Lost(now.side, nil)
	}
	if old.side == nil {
		old.side = drift.Lost(now.side, d.Changes)
	}
	return d, d.tell(ctx, old.side, now.side, o)
}

// list fills in what is known of the files of a side.
func (l *Lab) list(ctx context.Context, s *listedSide, orBirth bool) (err error) {
	g := s.disk.g
	if s.root != nil {
		s.side = s.root
		if s.list, err = s.root.Manifest(ctx); err != nil {
			return fmt.Errorf("listing the files of %s: %w", g, err)
		}
		return nil
	}
	m, rerr := l.running(ctx, g.Machine)
	runs := rerr == nil && m.Generation == g.Number && m.Phase == ledger.PhaseReady
	if !s.birth && runs {
		return l.listNow(ctx, s, m)
	}
	if !s.birth && !orBirth {
		return &NoListError{Generation: g, Err: s.err}
	}
	s.birth = true
	s.list, err = l.readList(g)
	if errors.Is(err, fs.ErrNotExist) {
		return &NoListError{Generation: g, Running: true, Err: s.err}
	}
	return err
}

// listNow asks the guest, and is ready to ask it for what is in a file.
func (l *Lab) listNow(ctx context.Context, s *listedSide, m ledger.Machine) error {
	target, err := l.target(m.Name, m.Create, "")
	if err != nil {
		return err
	}
	if s.attendant != nil {
		target = s.attendant.watched(ctx, target)
	}
	list, err := l.askList(ctx, target)
	if err != nil {
		return err
	}
	if s.list, err = drift.ReadManifest(bytes.NewReader(list)); err != nil {
		return fmt.Errorf("listing the files of %s: %w", s.disk.g, err)
	}
	var client *guest.RootClient
	s.end = func() {
		if client != nil {
			client.Close()
		}
	}
	s.side = drift.Asked(func(ctx context.Context, w io.Writer, path string, limit int64) error {
		if client == nil {
			c, err := guest.ConnectRoot(ctx, target)
			if err != nil {
				return err
			}
			client = c
		}
		return client.ReadFile(ctx, w, path, limit)
	})
	return nil
}

// readList reads what listBirth wrote.
func (l *Lab) readList(g lab.Generation) (*drift.Manifest, error) {
	f, err := os.Open(l.host.Dirs.Files(g))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, fmt.Errorf("the list of files of %s at its birth is damaged: %w", g, err)
	}
	m, err := drift.ReadManifest(io.LimitReader(z, maxList))
	if err != nil {
		return nil, fmt.Errorf("the list of files of %s at its birth is damaged: %w", g, err)
	}
	return m, nil
}
