// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// Message is one line of the protocol as QEMU sends it: exactly one of its
// pointers is set.
type Message struct {
	Greeting *Greeting
	Event    *Event
	Reply    *Reply
}

// Greeting is the first message of a monitor.
type Greeting struct {
	Version Version
	OOB     bool // the monitor offers out-of-band commands
}

// Version is QEMU's version.
type Version struct {
	Major, Minor, Micro int
	Package             string // the distribution's version; may be empty
}

// String renders the version the way QEMU writes it: "7.2.22".
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// AtLeast reports whether v is major.minor or newer.
func (v Version) AtLeast(major, minor int) bool {
	return v.Major > major || v.Major == major && v.Minor >= minor
}

// Event is something that QEMU says unasked.
type Event struct {
	Name string          // "SHUTDOWN"
	Data json.RawMessage // nil if it carries none
	At   time.Time       // by the host's clock; zero if QEMU could not read it
}

// Reply is the answer to one command.
type Reply struct {
	ID     string // of the command; empty if the command could not be parsed
	Return json.RawMessage
	Err    *Error // set if the command was refused
}

// Error is QEMU's refusal of a command.
type Error struct {
	Class string `json:"class"` // "GenericError", "CommandNotFound", …
	Desc  string `json:"desc"`
}

// Error returns QEMU's own words.
func (e *Error) Error() string { return e.Desc }

// ParseMessage decodes one line.
func ParseMessage(line []byte) (Message, error) {
	var w struct {
		QMP *struct {
			Version struct {
				QEMU struct {
					Major int `json:"major"`
					Minor int `json:"minor"`
					Micro int `json:"micro"`
				} `json:"qemu"`
				Package string `json:"package"`
			} `json:"version"`
			Capabilities []string `json:"capabilities"`
		} `json:"QMP"`
		Event     *string         `json:"event"`
		Data      json.RawMessage `json:"data"`
		Timestamp struct {
			Seconds      int64 `json:"seconds"`
			Microseconds int64 `json:"microseconds"`
		} `json:"timestamp"`
		ID     json.RawMessage `json:"id"`
		Return json.RawMessage `json:"return"`
		Error  *Error          `json:"error"`
	}
	if err := json.Unmarshal(line, &w); err != nil {
		return Message{}, fmt.Errorf("parsing monitor message: %w", err)
	}
	switch {
	case w.QMP != nil:
		q := w.QMP.Version.QEMU
		g := Greeting{Version: Version{q.Major, q.Minor, q.Micro, w.QMP.Version.Package}}
		for _, c := range w.QMP.Capabilities {
			g.OOB = g.OOB || c == "oob"
		}
		return Message{Greeting: &g}, nil
	case w.Event != nil:
		e := Event{Name: *w.Event, Data: w.Data}
		// QEMU sends -1 when its clock cannot be read.
		if t := w.Timestamp; t.Seconds > 0 && t.Microseconds >= 0 {
			e.At = time.Unix(t.Seconds, t.Microseconds*1000)
		}
		return Message{Event: &e}, nil
	case w.Error != nil || w.Return != nil:
		r := Reply{Return: w.Return, Err: w.Error}
		if w.ID != nil {
			// An ID that is not a string is none that this package ever sent.
			if err := json.Unmarshal(w.ID, &r.ID); err != nil {
				return Message{}, fmt.Errorf("parsing monitor message: id: %w", err)
			}
		}
		return Message{Reply: &r}, nil
	}
	return Message{}, errors.New("parsing monitor message: neither greeting, event nor reply")
}

// ReadEvents returns the events among the messages of a recorded monitor. A torn
// or damaged line is skipped: the record's writer may die while it writes.
func ReadEvents(record io.Reader) ([]Event, error) {
	b, err := io.ReadAll(record)
	if err != nil {
		return nil, fmt.Errorf("reading recorded events: %w", err)
	}
	var events []Event
	for line := range bytes.Lines(b) {
		// A record whose head was given back to the file system starts with zeros.
		line = bytes.TrimLeft(line, "\x00")
		if !bytes.Contains(line, []byte(`"event"`)) {
			continue
		}
		if m, err := ParseMessage(line); err == nil && m.Event != nil {
			events = append(events, *m.Event)
		}
	}
	return events, nil
}
