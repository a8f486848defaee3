// SPDX-License-Identifier: Apache-2.0

// Package filestream copies files and folders from one system to another as one
// stream, without a round trip for each file.
//
// The host begins with one line of JSON, a Request. Files then come as entries: a
// folder's contents stand between its Dir and an Up, so that an entry has a base
// name only and there is no path to lead astray. The data of a file follows its
// entry in chunks, each behind the length of the hole before it. An End closes the
// stream and says whether everything was sent. To a put the agent answers with an
// End as well, once everything is written or as soon as something fails.
package filestream

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"syscall"
	"time"
)

// Subsystem is the name under which an agent's ssh server offers the stream.
const Subsystem = "files@labfile.dev"

// Op says which way files go.
type Op string

// The directions.
const (
	Put Op = "put" // to the guest
	Get Op = "get" // from the guest
)

// Request is what the host asks. Relative paths begin in the user's home.
type Request struct {
	Op      Op       `json:"op"`
	Target  string   `json:"target,omitempty"`  // put
	Into    bool     `json:"into,omitempty"`    // put: Target must be a folder
	Stream  bool     `json:"stream,omitempty"`  // put: of one file without a name, so Target must not be a folder
	Sources []string `json:"sources,omitempty"` // get: paths or patterns
}

// Kind is what an entry is.
type Kind byte

// The kinds of entries.
const (
	File  Kind = 'f'
	Dir   Kind = 'd'
	Up    Kind = 'u' // the end of the folder that was begun last
	Link  Kind = 'l' // symbolic
	Count Kind = 'n' // begins the answer to a get: Size says how many things were named
	End   Kind = 'e'
)

// Contents is the name of a folder of which only the contents are meant.
const Contents = "."

// Entry is one thing in the stream.
type Entry struct {
	Kind Kind
	Name string      // base name
	Mode fs.FileMode // permissions; 0: those that a new file has
	Time time.Time   // of the last change; zero: now
	Size int64       // of a file, to tell how far it is; -1 if that is not known
	To   string      // where a link leads; the JSON of an Outcome for End
}

// Outcome is how a stream ended.
type Outcome struct {
	Failure  *Failure `json:"failure,omitempty"`
	Skipped  []string `json:"skipped,omitempty"`  // neither files nor folders nor links
	Vanished []string `json:"vanished,omitempty"` // removed while their folder was copied
}

// What is why something failed.
type What string

// The reasons that have a wording of their own.
const (
	NoFile   What = "no-file"   // Path does not exist, or nothing matches it
	NoFolder What = "no-folder" // Path is not a folder, or does not exist
	IsFolder What = "is-folder" // Path is a folder where a file is wanted
	Other    What = "other"     // Text says it
)

// Failure is an error of one side that the other side reports.
type Failure struct {
	What What   `json:"what"`
	Path string `json:"path,omitempty"`
	Text string `json:"text,omitempty"`

	Errno syscall.Errno `json:"errno,omitempty"` // if the system gave one
}

// Unwrap returns the system's error, if there is one.
func (f *Failure) Unwrap() error {
	if f.Errno == 0 {
		return nil
	}
	return f.Errno
}

// Error describes the failure without saying where it happened.
func (f *Failure) Error() string {
	switch f.What {
	case NoFile:
		return "there is no file or folder " + f.Path
	case NoFolder:
		return "there is no folder " + f.Path
	case IsFolder:
		return f.Path + " is a folder"
	}
	return f.Text
}

// On is the failure as seen from the host.
func (f *Failure) On(machine string) string {
	switch f.What {
	case NoFile:
		if strings.ContainsAny(f.Path, "*?[") {
			return fmt.Sprintf("%s has no file that matches %s", machine, f.Path)
		}
		return fmt.Sprintf("%s has no file or folder %s", machine, f.Path)
	case NoFolder:
		return fmt.Sprintf("%s has no folder %s", machine, f.Path)
	case IsFolder:
		return fmt.Sprintf("%s is a folder on %s", f.Path, machine)
	}
	return fmt.Sprintf("%s: %s", machine, f.Text)
}

// failure makes a Failure of any error.
func failure(err error) *Failure {
	var f *Failure
	if err == nil || errors.As(err, &f) {
		return f
	}
	return Said(err, err.Error())
}

// Said is a Failure with a text of its own.
func Said(err error, text string) *Failure {
	f := &Failure{What: Other, Text: text}
	if !errors.As(err, &f.Errno) && errors.Is(err, fs.ErrPermission) {
		f.Errno = syscall.EACCES
	}
	return f
}

// The longest that is read, in bytes.
const (
	maxRequest = 1 << 20
	maxString  = 1 << 20
	maxChunk   = 256 << 10
)

// ErrMalformed says that the other side does not speak this protocol.
var ErrMalformed = errors.New("malformed stream of files")

// Encoder writes a stream.
type Encoder struct {
	w   *bufio.Writer
	buf []byte
}

// NewEncoder returns an encoder that writes to w.
func NewEncoder(w io.Writer) *Encoder { return &Encoder{w: bufio.NewWriterSize(w, 64<<10)} }

// Entry writes an entry. A file's data must follow.
func (e *Encoder) Entry(x Entry) error {
	b := append(e.buf[:0], byte(x.Kind))
	b = appendString(b, x.Name)
	b = binary.AppendUvarint(b, uint64(x.Mode.Perm()))
	var sec int64
	var nsec uint64
	if !x.Time.IsZero() {
		sec, nsec = x.Time.Unix(), uint64(x.Time.Nanosecond())+1
	}
	b = binary.AppendVarint(b, sec)
	b = binary.AppendUvarint(b, nsec) // 0: there is no time
	b = binary.AppendVarint(b, x.Size)
	b = appendString(b, x.To)
	e.buf = b
	_, err := e.w.Write(b)
	return err
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// Chunk writes data of a file behind a hole of so many bytes.
func (e *Encoder) Chunk(hole int64, data []byte) error {
	for len(data) > maxChunk {
		if err := e.chunk(hole, data[:maxChunk]); err != nil {
			return err
		}
		hole, data = 0, data[maxChunk:]
	}
	if len(data) == 0 {
		return nil
	}
	return e.chunk(hole, data)
}

func (e *Encoder) chunk(hole int64, data []byte) error {
	b := binary.AppendUvarint(e.buf[:0], uint64(hole))
	b = binary.AppendUvarint(b, uint64(len(data)))
	e.buf = b
	if _, err := e.w.Write(b); err != nil {
		return err
	}
	_, err := e.w.Write(data)
	return err
}

// Close ends a file, behind a last hole.
func (e *Encoder) Close(hole int64) error { return e.chunk(hole, nil) }

// End writes the last entry and everything that is buffered.
func (e *Encoder) End(o Outcome) error {
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	if err := e.Entry(Entry{Kind: End, To: string(b)}); err != nil {
		return err
	}
	return e.Flush()
}

// Flush writes what is buffered.
func (e *Encoder) Flush() error { return e.w.Flush() }

// Decoder reads a stream.
type Decoder struct{ r *bufio.Reader }

// NewDecoder returns a decoder that reads from r, and more than it needs.
func NewDecoder(r io.Reader) *Decoder { return &Decoder{bufio.NewReaderSize(r, 64<<10)} }

// Request reads what begins the stream.
func (d *Decoder) Request() (Request, error) {
	var line []byte
	var q Request
	for {
		part, err := d.r.ReadSlice('\n')
		if line = append(line, part...); len(line) > maxRequest {
			return q, fmt.Errorf("%w: the request is too long", ErrMalformed)
		}
		if err == nil {
			return q, json.Unmarshal(line, &q)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return q, unexpected(err)
		}
	}
}

// Entry reads the next entry.
func (d *Decoder) Entry() (Entry, error) {
	k, err := d.r.ReadByte()
	if err != nil {
		return Entry{}, unexpected(err)
	}
	e := Entry{Kind: Kind(k)}
	switch e.Kind {
	case File, Dir, Up, Link, Count, End:
	default:
		return e, fmt.Errorf("%w: no such entry", ErrMalformed)
	}
	var mode, nsec uint64
	var sec int64
	for _, read := range []func() error{
		func() (err error) { e.Name, err = d.string(); return },
		func() (err error) { mode, err = binary.ReadUvarint(d.r); return },
		func() (err error) { sec, err = binary.ReadVarint(d.r); return },
		func() (err error) { nsec, err = binary.ReadUvarint(d.r); return },
		func() (err error) { e.Size, err = binary.ReadVarint(d.r); return },
		func() (err error) { e.To, err = d.string(); return },
	} {
		if err := read(); err != nil {
			return e, unexpected(err)
		}
	}
	if nsec > 1e9 {
		return e, fmt.Errorf("%w: no such time", ErrMalformed)
	}
	e.Mode = fs.FileMode(mode).Perm()
	if nsec > 0 {
		e.Time = time.Unix(sec, int64(nsec-1))
	}
	return e, nil
}

func (d *Decoder) string() (string, error) {
	n, err := binary.ReadUvarint(d.r)
	if err != nil {
		return "", err
	}
	if n > maxString {
		return "", fmt.Errorf("%w: a name of %d bytes", ErrMalformed, n)
	}
	b := make([]byte, n)
	_, err = io.ReadFull(d.r, b)
	return string(b), err
}

// Chunk reads the next chunk of a file: a hole of so many bytes, then data, which is
// valid until the next call. At the end of the file there is no data.
func (d *Decoder) Chunk(buf []byte) (hole int64, data []byte, err error) {
	h, err := binary.ReadUvarint(d.r)
	if err != nil {
		return 0, nil, unexpected(err)
	}
	n, err := binary.ReadUvarint(d.r)
	if err != nil {
		return 0, nil, unexpected(err)
	}
	if h > 1<<62 || n > maxChunk || n > uint64(len(buf)) {
		return 0, nil, fmt.Errorf("%w: no such chunk", ErrMalformed)
	}
	_, err = io.ReadFull(d.r, buf[:n])
	return int64(h), buf[:n], unexpected(err)
}

// outcome reads what an End says.
func outcome(e Entry) (Outcome, error) {
	var o Outcome
	if err := json.Unmarshal([]byte(e.To), &o); err != nil {
		return o, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return o, nil
}

// Outcome reads the End that answers a put.
func (d *Decoder) Outcome() (Outcome, error) {
	e, err := d.Entry()
	if err != nil {
		return Outcome{}, err
	}
	if e.Kind != End {
		return Outcome{}, fmt.Errorf("%w: an answer of kind %q", ErrMalformed, e.Kind)
	}
	return outcome(e)
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
