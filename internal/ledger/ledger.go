// SPDX-License-Identifier: Apache-2.0

// Package ledger keeps a lab's append-only record of everything that happened
// to it, and folds the record into the lab's state. There is no other state.
package ledger

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
)

// Record is one line of the ledger. Each carries the hash of the line before
// it, so that a record can be lost only together with all that follow it.
type Record struct {
	Seq        int             `json:"seq"`  // counts from 1
	Prev       string          `json:"prev"` // hex SHA-256 of the previous line without its newline; empty for the first
	Time       time.Time       `json:"time"`
	Type       Type            `json:"type"`
	Command    string          `json:"command,omitempty"` // what the user typed, or Supervisor
	Run        string          `json:"run,omitempty"`     // tells one run of a command from the next; older records have none
	Machine    lab.Name        `json:"machine,omitempty"`
	Generation int             `json:"generation,omitempty"`
	Data       json.RawMessage `json:"data,omitempty"`
}

// Supervisor is the Command of what a lab's supervisor does by itself.
const Supervisor = "supervisor"

// maxLine bounds what is believed to be one record: a spec with its user data.
const maxLine = 4 << 20

// CorruptError says that the ledger was changed by something other than lab.
type CorruptError struct {
	Path string
	Line int
	Why  string
}

// Error implements error.
func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s:%d: the ledger is damaged: %s", e.Path, e.Line, e.Why)
}

// Ledger is the record in one file. Several processes may append to it and read
// it at once.
type Ledger struct {
	path string
	run  string // of what is appended here for a command
	now  func() time.Time
}

// Open returns the ledger at path; the file is made by the first Append. What one Ledger
// appends for a command is one run of it.
func Open(path string) *Ledger {
	return &Ledger{path: path, run: rand.Text()[:8], now: time.Now}
}

// Exists reports whether anything was ever recorded.
func (l *Ledger) Exists() bool {
	_, err := os.Stat(l.path)
	return err == nil
}

// Append adds a record and returns once it is on the disk. The caller fills in
// everything but Seq, Prev, Time and Run. Data is marshalled as JSON unless it is nil.
func (l *Ledger) Append(r Record, data any) (Record, error) {
	return l.append(r, data, os.O_CREATE)
}

// AppendIfExists is Append, but does not make the file: the error is fs.ErrNotExist if
// nothing was ever recorded, or the ledger was removed.
func (l *Ledger) AppendIfExists(r Record, data any) (Record, error) {
	return l.append(r, data, 0)
}

// append is Append with what else the file is to be opened with.
func (l *Ledger) append(r Record, data any, flags int) (Record, error) {
	if data != nil {
		raw, err := json.Marshal(data)
		if err != nil {
			return Record{}, fmt.Errorf("encoding a %s record: %w", r.Type, err)
		}
		r.Data = raw
	}
	fresh := !l.Exists()
	f, err := os.OpenFile(l.path, os.O_RDWR|flags, 0o600)
	if err != nil {
		return Record{}, fmt.Errorf("opening the ledger: %w", err)
	}
	defer f.Close()
	// The lock lasts for one append, a few milliseconds; readers never take it.
	if err := fsutil.Lock(f); err != nil {
		return Record{}, fmt.Errorf("locking the ledger: %w", err)
	}
	last, end, err := l.tail(f)
	if err != nil {
		return Record{}, err
	}
	if err := f.Truncate(end); err != nil { // drops a torn last line
		return Record{}, fmt.Errorf("truncating the ledger: %w", err)
	}
	r.Seq, r.Time = 1, l.now().UTC().Round(0)
	if r.Command != "" {
		r.Run = l.run
	}
	if last != nil {
		var before Record
		if err := json.Unmarshal(last, &before); err != nil {
			return Record{}, &CorruptError{Path: l.path, Why: "its last line is not a record"}
		}
		r.Seq, r.Prev = before.Seq+1, hash(last)
	}
	line, err := json.Marshal(r)
	if err != nil {
		return Record{}, fmt.Errorf("encoding a %s record: %w", r.Type, err)
	}
	if len(line) >= maxLine {
		return Record{}, fmt.Errorf("a %s record of %d bytes is too large", r.Type, len(line))
	}
	if _, err := f.WriteAt(append(line, '\n'), end); err != nil {
		return Record{}, fmt.Errorf("writing the ledger: %w", err)
	}
	if err := f.Sync(); err != nil {
		return Record{}, fmt.Errorf("writing the ledger: %w", err)
	}
	if fresh {
		if err := fsutil.SyncDir(filepath.Dir(l.path)); err != nil {
			return Record{}, err
		}
	}
	return r, nil
}

// tail returns the last whole line without its newline (nil if there is none)
// and the offset behind it.
func (l *Ledger) tail(f *os.File) (line []byte, end int64, err error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, 0, fmt.Errorf("reading the ledger: %w", err)
	}
	// The last line and a torn one behind it fit into two of the largest.
	from := max(0, size-2*maxLine)
	buf := make([]byte, size-from)
	if _, err := f.ReadAt(buf, from); err != nil && !errors.Is(err, io.EOF) {
		return nil, 0, fmt.Errorf("reading the ledger: %w", err)
	}
	nl := bytes.LastIndexByte(buf, '\n')
	if nl < 0 {
		if from > 0 {
			return nil, 0, &CorruptError{Path: l.path, Why: "its last line has no end"}
		}
		return nil, 0, nil
	}
	start := bytes.LastIndexByte(buf[:nl], '\n') + 1
	return buf[start:nl], from + int64(nl) + 1, nil
}

// Read returns all records, oldest first; none if the ledger does not exist. It
// takes no lock: a line that is being written is not there yet. With a
// *CorruptError come the records before the damage.
func (l *Ledger) Read() ([]Record, error) {
	data, err := os.ReadFile(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the ledger: %w", err)
	}
	return parse(l.path, data)
}

// Opened returns what the last record of type LabOpened says; ok is false if there is
// none. It reads no other record, and does not mind damage.
func (l *Ledger) Opened() (o Opened, ok bool, err error) {
	data, err := os.ReadFile(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return o, false, nil
	}
	if err != nil {
		return o, false, fmt.Errorf("reading the ledger: %w", err)
	}
	for line := range bytes.Lines(data) {
		var r Record
		if !bytes.Contains(line, []byte(`"`+LabOpened+`"`)) || json.Unmarshal(line, &r) != nil || r.Type != LabOpened {
			continue
		}
		var next Opened
		if json.Unmarshal(r.Data, &next) == nil {
			o, ok = next, true
		}
	}
	return o, ok, nil
}

func parse(path string, data []byte) ([]Record, error) {
	var (
		records []Record
		prev    string
	)
	for n := 1; ; n++ {
		line, rest, whole := bytes.Cut(data, []byte{'\n'})
		if !whole { // nothing left, or a torn last line: it was never acknowledged
			return records, nil
		}
		var r Record
		switch err := json.Unmarshal(line, &r); {
		case err != nil:
			return records, &CorruptError{path, n, "not a record"}
		case r.Seq != n:
			return records, &CorruptError{path, n, fmt.Sprintf("record %d stands where record %d belongs", r.Seq, n)}
		case r.Prev != prev:
			return records, &CorruptError{path, n, "its hash of the line before does not match"}
		}
		prev = hash(line)
		records = append(records, r)
		data = rest
	}
}

func hash(line []byte) string {
	sum := sha256.Sum256(line)
	return hex.EncodeToString(sum[:])
}
