// SPDX-License-Identifier: Apache-2.0

//go:build linux

package hostfs

import (
	"context"
	"io"
	"path"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/labfile/lab/internal/guest/foldercache"
)

// maxKept bounds the content that is kept in advance, in bytes.
const maxKept = 8 << 20

// restless is how long a folder that changed at once is asked for file by file.
const restless = 2 * time.Second

// leases are the folders of which the guest knows what is in them, until the host says
// that something changed.
type leases struct {
	changed func(dir, name string) // tells the kernel; may block
	waits   func()                 // is called before something has to wait; may be nil

	mu      sync.Mutex
	stream  *leaseStream // nil while there is none
	folders map[string]*lease
	refused map[string]time.Time // folders that the host does not tell of, until then
	ever    map[string]bool      // folders of which the kernel may remember something
	drops   uint64               // how often anything was dropped
	kept    int                  // bytes of all content
}

// lease is what is known of a folder. Its maps are never written to once it is there.
type lease struct {
	files []foldercache.File // sorted by name
	attrs map[string]attr
	first string // small file; empty if there is none
	told  time.Time
	until time.Time
	loose bool // it has files whose attributes hold for a moment only

	content map[string]foldercache.File // guarded by leases.mu
	self    *attr                       // of the folder itself, if it is known; guarded by leases.mu
}

// inOrder notices when the files of a folder are read one after the other.
type inOrder struct {
	mu   sync.Mutex
	last string
	n    int
}

// next reports whether a file is one of several that are read in order.
func (o *inOrder) next(name string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.n++; name <= o.last {
		o.n = 0
	}
	o.last = name
	return o.n > 1
}

// leaseStream is one connection.
type leaseStream struct {
	writing sync.Mutex
	out     *foldercache.Writer // guarded by writing, which may be held for long

	next    uint64                              // guarded by leases.mu
	waiting map[uint64]chan foldercache.Message // guarded by leases.mu

	events chan [2]string
	ended  chan struct{}
}

func newLeases(changed func(dir, name string)) *leases {
	return &leases{changed: changed, folders: map[string]*lease{}, refused: map[string]time.Time{}, ever: map[string]bool{}}
}

// serve uses conn until it ends, in place of the one before.
func (l *leases) serve(conn io.ReadWriteCloser) error {
	defer conn.Close()
	s := &leaseStream{
		out: foldercache.NewWriter(conn), waiting: map[uint64]chan foldercache.Message{},
		events: make(chan [2]string, 10000), ended: make(chan struct{}),
	}
	l.mu.Lock()
	l.stream = s
	l.mu.Unlock()
	l.forget()
	defer func() {
		close(s.ended)
		l.mu.Lock()
		if l.stream == s {
			l.stream = nil
		}
		l.mu.Unlock()
		l.forget()
	}()
	// The kernel may have to wait for an answer of ours until it takes a notice.
	go func() {
		for {
			select {
			case e := <-s.events:
				l.changed(e[0], e[1])
			case <-s.ended:
				return
			}
		}
	}()
	in := foldercache.NewReader(conn)
	for {
		m, err := in.Message()
		if err != nil {
			return err
		}
		switch m.Kind {
		case foldercache.Listing, foldercache.Content:
			l.mu.Lock()
			ch := s.waiting[m.ID]
			delete(s.waiting, m.ID)
			l.mu.Unlock()
			if ch != nil {
				ch <- m
			}
		case foldercache.Changed:
			l.drop(m.Path, m.Name)
			select {
			case s.events <- [2]string{m.Path, m.Name}:
			default:
				return foldercache.ErrMalformed // more than anybody can follow: begin anew
			}
		default:
			l.forget()
		}
	}
}

// forget drops everything, what the kernel remembers too.
func (l *leases) forget() {
	l.mu.Lock()
	old := l.ever
	l.folders, l.refused, l.kept, l.ever = map[string]*lease{}, map[string]time.Time{}, 0, map[string]bool{}
	l.drops++
	l.mu.Unlock()
	go func() {
		for dir := range old {
			l.changed(dir, "")
		}
	}()
}

// changing is called before a folder is changed here, and what it returns afterwards:
// what the host said in between may be from before or from after.
func (l *leases) changing(dirs ...string) func() {
	drop := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.drops++
		for _, dir := range dirs {
			l.remove(dir)
		}
	}
	drop()
	return drop
}

// drop drops what is known of a folder and, if the named file is one, of that and all
// within it.
func (l *leases) drop(dir, name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drops++
	l.remove(dir)
	prefix := dir
	if name != "" {
		prefix = path.Join(dir, name)
		if old, ok := l.folders[prefix]; ok && old != nil {
			l.remove(prefix)
		} else if _, known := l.folders[prefix]; !known && !l.within(prefix) {
			return
		}
	}
	prefix = strings.TrimSuffix(prefix, "/") + "/"
	for p := range l.folders {
		if strings.HasPrefix(p, prefix) {
			l.remove(p)
		}
	}
}

func (l *leases) within(dir string) bool {
	for p := range l.folders {
		if strings.HasPrefix(p, dir+"/") {
			return true
		}
	}
	return false
}

func (l *leases) remove(dir string) {
	if old := l.folders[dir]; old != nil {
		for _, f := range old.content {
			l.kept -= len(f.Data)
		}
		if now := time.Now(); now.Before(old.until.Add(time.Second - foldercache.Lifetime)) {
			l.refused[dir] = now.Add(restless) // it would be asked for again and again
		}
	}
	delete(l.folders, dir)
}

// known returns what is known of a folder, and nil if that is nothing.
func (l *leases) known(dir string) *lease {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.folders[dir]
	if f == nil || time.Now().After(f.until) {
		return nil
	}
	return f
}

// folder returns the attributes of a folder itself, and until when they hold. The kernel
// looks at them for every name in it. What is done in the folder changes them; the host
// tells of that as long as it tells of the folder.
func (l *leases) folder(dir string) (attr, time.Time, bool) {
	f := l.known(dir)
	l.mu.Lock()
	defer l.mu.Unlock()
	if f == nil || f.self == nil {
		return attr{}, time.Time{}, false
	}
	return *f.self, f.until, true
}

// learn keeps the attributes of a folder that f was known of before they were asked
// for. If it changed meanwhile, f is no more.
func (l *leases) learn(dir string, f *lease, a attr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f != nil && l.folders[dir] == f {
		f.self = &a
	}
}

// get is known, but asks the host.
func (l *leases) get(ctx context.Context, dir string) *lease {
	if f := l.known(dir); f != nil {
		return f
	}
	l.mu.Lock()
	drops := l.drops
	no := time.Now().Before(l.refused[dir])
	l.mu.Unlock()
	if no {
		return nil
	}
	began := time.Now()
	m, ok := l.ask(ctx, foldercache.Request{Path: dir})
	if !ok {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if m.Errno != 0 {
		if m.Errno != syscall.EAGAIN && m.Errno != syscall.ENOENT {
			l.refused[dir] = began.Add(foldercache.Lifetime)
		}
		return nil
	}
	f := &lease{
		files: m.Files, attrs: make(map[string]attr, len(m.Files)), told: began, until: began.Add(foldercache.Lifetime),
		content: map[string]foldercache.File{},
	}
	for _, x := range m.Files {
		a := attr{Attr: x.Attr, mode: x.Mode, size: x.Size}
		f.attrs[x.Name], f.loose = a, f.loose || !leased(a)
		if f.first == "" && a.mode&syscall.S_IFMT == syscall.S_IFREG && a.size <= foldercache.SmallFile {
			f.first = x.Name
		}
	}
	if l.drops != drops {
		return nil // it may be older than what was dropped meanwhile
	}
	l.folders[dir] = f
	l.ever[dir] = true
	return f
}

// ask asks the host, and reports false if there is no answer.
func (l *leases) ask(ctx context.Context, q foldercache.Request) (foldercache.Message, bool) {
	l.mu.Lock()
	s := l.stream
	if s == nil {
		l.mu.Unlock()
		return foldercache.Message{}, false
	}
	s.next++
	q.ID = s.next
	answer := make(chan foldercache.Message, 1)
	s.waiting[q.ID] = answer
	l.mu.Unlock()
	if l.waits != nil {
		l.waits()
	}
	s.writing.Lock()
	err := s.out.Request(q)
	s.writing.Unlock()
	if err != nil {
		return foldercache.Message{}, false
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case m := <-answer:
		return m, true
	case <-s.ended:
	case <-ctx.Done():
	case <-t.C:
	}
	l.mu.Lock()
	delete(s.waiting, q.ID)
	l.mu.Unlock()
	return foldercache.Message{}, false
}

// data returns the content of a small file, once. That of the files behind it is asked
// for, too.
func (l *leases) data(ctx context.Context, dir, name string, a attr) ([]byte, bool) {
	f := l.known(dir)
	if f == nil || a.size > foldercache.SmallFile {
		return nil, false
	}
	if b, ok := l.take(f, name, a); ok {
		return b, true
	}
	m, ok := l.ask(ctx, foldercache.Request{Path: dir, From: name})
	if !ok || m.Errno != 0 {
		return nil, false
	}
	l.mu.Lock()
	if l.folders[dir] == f {
		for _, x := range m.Files {
			if l.kept += len(x.Data) - len(f.content[x.Name].Data); l.kept > maxKept {
				l.kept -= len(x.Data) - len(f.content[x.Name].Data)
				for _, other := range l.folders { // what was not wanted so far
					other.content = map[string]foldercache.File{}
				}
				l.kept = len(x.Data)
			}
			f.content[x.Name] = x
		}
	}
	l.mu.Unlock()
	return l.take(f, name, a)
}

// take takes the content of a file if it is that of a, in a folder that has not changed.
func (l *leases) take(f *lease, name string, a attr) ([]byte, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	x, ok := f.content[name]
	if !ok {
		return nil, false
	}
	delete(f.content, name)
	l.kept -= len(x.Data)
	b := attr{Attr: x.Attr, mode: x.Mode, size: x.Size}
	return x.Data, a.same(b) && a.unchanged(b)
}
