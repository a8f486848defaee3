// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/labfile/lab/internal/guest/filestream"
)

// ErrUnsafeName says that the guest named a file in a way that would leave the
// folder it is copied to.
var ErrUnsafeName = filestream.ErrUnsafeName

// CopyOptions say how to copy.
type CopyOptions struct {
	// Progress is told how far a file is, in bytes, at its beginning and end and
	// now and then in between; total is what the file is said to have. It may be
	// called from several goroutines, one at a time.
	Progress func(path string, done, total int64)

	// Stdin is what the source "-" of an Upload means, Stdout what the target "-" of
	// a Download means. Without them "-" is a file of that name.
	Stdin  io.Reader
	Stdout io.Writer
}

// stdio is the path that means standard input or output.
const stdio = "-"

// SkippedError says that everything was copied but these.
type SkippedError struct {
	Paths    []string // neither files nor folders nor symbolic links
	Vanished []string // removed while their folder was copied
}

func (e *SkippedError) Error() string {
	var why []string
	if len(e.Paths) > 0 {
		why = append(why, "not copied, being no ordinary files: "+strings.Join(e.Paths, ", "))
	}
	if len(e.Vanished) > 0 {
		why = append(why, "not copied, removed meanwhile: "+strings.Join(e.Vanished, ", "))
	}
	return strings.Join(why, "; ")
}

// Upload copies files and folders into the guest, with modes (but for set-id bits),
// times, holes and symbolic links. If target is a folder or ends in a slash, or there
// are several sources, they go into it; otherwise target is the name that the only
// source gets. A source that ends in "." means the contents of a folder. A relative
// target begins in the user's home.
//
// Errors: *SkippedError, ErrDisconnected, those of the file systems.
func (c *Client) Upload(ctx context.Context, sources []string, target string, opt CopyOptions) error {
	q := filestream.Request{Op: filestream.Put, Target: target, Into: len(sources) > 1 || strings.HasSuffix(target, "/")}
	if q.Stream = slices.Contains(sources, stdio) && opt.Stdin != nil; q.Stream && q.Into {
		return errors.New("standard input needs the name of a file on the machine")
	}
	for _, src := range sources {
		if _, err := os.Stat(src); err != nil && !q.Stream {
			return local(src, err)
		}
	}
	return c.transfer(ctx, func(st *fileStream) (filestream.Outcome, error) {
		if st == nil {
			return c.uploadSFTP(ctx, q, sources, opt)
		}
		return st.upload(ctx, q, sources, opt)
	})
}

// local says that a path on the host does not exist.
func local(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return &filestream.Failure{What: filestream.NoFile, Path: path}
	}
	return err
}

// Download copies files and folders out of the guest, as Upload does it; sources may
// be patterns. What the guest says is not trusted: nothing is written outside the
// target, and no file gets an owner, a set-id bit or the type of a device.
//
// Errors: *SkippedError, ErrUnsafeName, ErrDisconnected, those of the file systems.
func (c *Client) Download(ctx context.Context, sources []string, target string, opt CopyOptions) error {
	dst, err := newDestination(ctx, sources, target, opt)
	if err != nil {
		return err
	}
	return c.transfer(ctx, func(st *fileStream) (filestream.Outcome, error) {
		if st == nil {
			return c.downloadSFTP(ctx, sources, dst)
		}
		if err := st.ask(filestream.Request{Op: filestream.Get, Sources: sources}); err != nil {
			return filestream.Outcome{}, err
		}
		return dst.receive(filestream.NewDecoder(st.out))
	})
}

// fileStream is a session with an agent that knows filestream.
type fileStream struct {
	in   io.WriteCloser
	out  io.Reader
	said tail
	end  func()
}

// stream begins one. It is nil if what serves ssh in the guest has no such thing: it is
// another server, or an agent of an earlier lab.
func (c *Client) stream() (*fileStream, error) {
	s, err := c.ssh.NewSession()
	if err != nil {
		return nil, fmt.Errorf("starting a file transfer: %w", lost(err))
	}
	st := &fileStream{end: func() { s.Close() }}
	s.Stderr = &st.said
	if st.in, err = s.StdinPipe(); err == nil {
		st.out, err = s.StdoutPipe()
	}
	if err == nil {
		if err = s.RequestSubsystem(filestream.Subsystem); err == nil {
			return st, nil
		}
		if err.Error() == "ssh: subsystem request failed" { // as x/crypto says it, without a type
			err = nil
		}
	}
	s.Close()
	return nil, lost(err)
}

// transfer runs f, which fails with ctx's cause if ctx ends. The login is lost then: a
// guest that stands still would not hear that the transfer is over.
func (c *Client) transfer(ctx context.Context, f func(*fileStream) (filestream.Outcome, error)) error {
	if ctx.Err() != nil {
		return fmt.Errorf("copying files: %w", context.Cause(ctx))
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	var (
		st   *fileStream
		o    filestream.Outcome
		err  error
		done = make(chan struct{})
	)
	go func() {
		defer close(done)
		if st, err = c.stream(); err != nil {
			return
		}
		if st != nil {
			defer st.end()
		}
		o, err = f(st)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		// A channel that was opened while the login ended may wait for ever.
		select {
		case <-done:
		case <-time.After(mercy):
		}
	}
	if !stop() {
		return fmt.Errorf("copying files: %w", context.Cause(ctx))
	}
	switch {
	case err == nil && o.Failure != nil:
		return &guestError{c.machine, o.Failure}
	case errors.Is(err, io.ErrUnexpectedEOF) && st != nil:
		if why := st.said.String(); why != "" {
			return fmt.Errorf("copying files: %s: %w", why, ErrDisconnected)
		}
		return fmt.Errorf("copying files: %w", ErrDisconnected)
	case err != nil:
		return err
	case len(o.Skipped) > 0 || len(o.Vanished) > 0:
		return &SkippedError{o.Skipped, o.Vanished}
	}
	return nil
}

// guestError is what failed in the guest.
type guestError struct {
	machine string
	failure *filestream.Failure
}

func (e *guestError) Error() string { return e.failure.On(e.machine) }

func (e *guestError) Unwrap() error { return e.failure }

func (s *fileStream) ask(q filestream.Request) error {
	b, err := json.Marshal(q)
	if err != nil {
		return err
	}
	_, err = s.in.Write(append(b, '\n'))
	return lost(err)
}

// upload sends the sources while it waits for the guest's answer, which comes early if
// something fails there.
func (s *fileStream) upload(ctx context.Context, q filestream.Request, sources []string, opt CopyOptions) (filestream.Outcome, error) {
	send := &filestream.Sender{Progress: opt.progress()}
	sent := make(chan error, 1)
	go func() {
		err := s.ask(q)
		if err == nil {
			send.Encoder = filestream.NewEncoder(s.in)
			err = sendAll(ctx, send, q, sources, opt)
		}
		sent <- err
	}()
	type answer struct {
		o   filestream.Outcome
		err error
	}
	answered := make(chan answer, 1)
	go func() {
		o, err := filestream.NewDecoder(s.out).Outcome()
		answered <- answer{o, err}
	}()
	var a answer
	select {
	case a = <-answered:
		s.end() // ends what is being sent
		if a.o.Failure == nil && a.err == nil {
			a.err = <-sent
		}
	case err := <-sent:
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, ErrDisconnected) {
			return a.o, err
		}
		a = <-answered
	}
	a.o.Skipped = append(a.o.Skipped, send.Skipped...)
	a.o.Vanished = append(a.o.Vanished, send.Vanished...)
	return a.o, a.err
}

// sendAll writes the sources and the end of the stream.
func sendAll(ctx context.Context, send *filestream.Sender, q filestream.Request, sources []string, opt CopyOptions) error {
	if q.Stream {
		if err := send.Stream(ctx, "stdin", stdio, opt.Stdin); err != nil {
			return err
		}
		return send.End(filestream.Outcome{})
	}
	for _, src := range sources {
		if err := send.Send(ctx, src); err != nil {
			return err
		}
	}
	return send.End(filestream.Outcome{})
}

const tellInterval = 100 * time.Millisecond

// progress is Progress, not told too often of one file.
func (opt CopyOptions) progress() func(string, int64, int64) {
	if opt.Progress == nil {
		return nil
	}
	var told time.Time
	return func(path string, done, total int64) {
		if done == 0 || done >= total || time.Since(told) >= tellInterval {
			told = time.Now()
			opt.Progress(path, done, total)
		}
	}
}
