// SPDX-License-Identifier: Apache-2.0

// Package foldercache is what a guest that has mounted a folder and the host that
// shares it say on a second stream, so that the guest need not ask for each file: whole
// folders with the attributes of their files, the content of small files in advance,
// and, from the host without being asked, what has changed since.
package foldercache

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// Lifetime is how long the guest may use what it was told, if it hears nothing else:
// the host does not learn of every change (another host's, or one through a mapping).
const Lifetime = time.Minute

// What one answer holds at most.
const (
	SmallFile  = 32 << 10  // bytes of a file whose content is sent in advance
	maxContent = 512 << 10 // bytes of all contents
	MaxFiles   = 20000     // in a folder; a larger one is asked for file by file
	maxName    = 4096
)

// ErrMalformed says that the other side does not speak this protocol.
var ErrMalformed = errors.New("malformed stream of a folder's cache")

// Request asks for a folder, or for the content of its small files.
type Request struct {
	ID   uint64
	Path string // of the folder, as in sftp
	From string // if it is not empty: the contents of this file and those behind it
}

// Kind is what the host says.
type Kind byte

// The kinds of messages.
const (
	Listing Kind = 'l' // answers a request without From
	Content Kind = 'c' // answers one with From
	Changed Kind = 'i' // Name in Path is not what it was; all of Path if Name is empty
	Forget  Kind = 'o' // nothing is what it was
)

// File is one file of a folder.
type File struct {
	Name string
	Mode uint32 // as stat(2) has it
	Size uint64
	Attr agentapi.Attr
	Data []byte // of a Content
}

// Message is what the host says.
type Message struct {
	Kind  Kind
	ID    uint64        // of the request
	Errno syscall.Errno // it cannot be answered; the guest asks by sftp
	Path  string
	Name  string
	Files []File // sorted by name
}

// Full reports whether so many bytes of content are enough for a message.
func Full(n int) bool { return n >= maxContent }

// Writer writes requests and messages.
type Writer struct {
	w *bufio.Writer
	b []byte
}

// NewWriter returns a Writer that writes to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: bufio.NewWriterSize(w, 64<<10)} }

func (w *Writer) uint(n uint64)    { w.b = binary.AppendUvarint(w.b, n) }
func (w *Writer) string(s string)  { w.uint(uint64(len(s))); w.b = append(w.b, s...) }
func (w *Writer) time(t time.Time) { w.b = binary.AppendVarint(w.b, t.UnixNano()) }
func (w *Writer) send() (err error) {
	if _, err = w.w.Write(w.b); err == nil {
		err = w.w.Flush()
	}
	w.b = w.b[:0]
	return err
}

// Request writes a request.
func (w *Writer) Request(q Request) error {
	w.uint(q.ID)
	w.string(q.Path)
	w.string(q.From)
	return w.send()
}

// Message writes a message.
func (w *Writer) Message(m Message) error {
	w.b = append(w.b, byte(m.Kind))
	w.uint(m.ID)
	w.uint(uint64(m.Errno))
	w.string(m.Path)
	w.string(m.Name)
	w.uint(uint64(len(m.Files)))
	for _, f := range m.Files {
		w.string(f.Name)
		w.uint(uint64(f.Mode))
		w.uint(f.Size)
		w.uint(f.Attr.Dev)
		w.uint(f.Attr.Ino)
		w.uint(f.Attr.Nlink)
		w.uint(f.Attr.Blocks)
		w.time(f.Attr.Atime)
		w.time(f.Attr.Mtime)
		w.time(f.Attr.Ctime)
		w.string(string(f.Data))
	}
	return w.send()
}

// Reader reads them.
type Reader struct {
	r   *bufio.Reader
	err error
}

// NewReader returns a Reader that reads from r, and more than it needs.
func NewReader(r io.Reader) *Reader { return &Reader{r: bufio.NewReaderSize(r, 64<<10)} }

func (r *Reader) uint(most uint64) uint64 {
	if r.err != nil {
		return 0
	}
	var n uint64
	if n, r.err = binary.ReadUvarint(r.r); r.err == nil && n > most {
		r.err = fmt.Errorf("%w: %d where at most %d is possible", ErrMalformed, n, most)
	}
	if r.err != nil {
		return 0
	}
	return n
}

func (r *Reader) bytes(most uint64) []byte {
	b := make([]byte, r.uint(most))
	if r.err == nil {
		_, r.err = io.ReadFull(r.r, b)
	}
	return b
}

func (r *Reader) time() time.Time {
	if r.err != nil {
		return time.Time{}
	}
	var n int64
	n, r.err = binary.ReadVarint(r.r)
	return time.Unix(0, n)
}

const anything = 1<<64 - 1

// Request reads a request.
func (r *Reader) Request() (Request, error) {
	q := Request{ID: r.uint(anything), Path: string(r.bytes(maxName)), From: string(r.bytes(maxName))}
	return q, r.err
}

// Message reads a message.
func (r *Reader) Message() (Message, error) {
	k, err := r.r.ReadByte()
	if err != nil {
		return Message{}, err
	}
	m := Message{Kind: Kind(k), ID: r.uint(anything), Errno: syscall.Errno(r.uint(4095)), Path: string(r.bytes(maxName)), Name: string(r.bytes(maxName))}
	for n := r.uint(MaxFiles); n > 0 && r.err == nil; n-- {
		f := File{Name: string(r.bytes(maxName)), Mode: uint32(r.uint(1<<32 - 1)), Size: r.uint(anything)}
		f.Attr = agentapi.Attr{Dev: r.uint(anything), Ino: r.uint(anything), Nlink: r.uint(anything), Blocks: r.uint(anything)}
		f.Attr.Atime, f.Attr.Mtime, f.Attr.Ctime = r.time(), r.time(), r.time()
		f.Data = r.bytes(SmallFile)
		m.Files = append(m.Files, f)
	}
	return m, r.err
}
