// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/guest/filestream"
)

// hostile is a file server that lies. Its folder "evil" holds entries; a file's
// content is always "gotcha". Or archive is what its tar makes of it.
type hostile struct {
	entries []fs.FileInfo
	archive []byte
}

type lie struct {
	name string
	mode fs.FileMode
}

func (l lie) Name() string       { return l.name }
func (l lie) Size() int64        { return 6 }
func (l lie) Mode() fs.FileMode  { return l.mode }
func (l lie) ModTime() time.Time { return time.Unix(1, 0) }
func (l lie) IsDir() bool        { return l.mode.IsDir() }
func (l lie) Sys() any           { return nil }

type lister []fs.FileInfo

func (l lister) ListAt(to []fs.FileInfo, off int64) (int, error) {
	if off >= int64(len(l)) {
		return 0, io.EOF
	}
	n := copy(to, l[off:])
	if int(off)+n == len(l) {
		return n, io.EOF
	}
	return n, nil
}

func (h hostile) Fileread(r *sftp.Request) (io.ReaderAt, error) {
	if filepath.Base(r.Filepath) == "gone" { // it was there when its folder was listed
		return nil, fs.ErrNotExist
	}
	return strings.NewReader("gotcha"), nil
}

func (h hostile) Filelist(r *sftp.Request) (sftp.ListerAt, error) {
	switch r.Method {
	case "List":
		if strings.Count(r.Filepath, "/") > 1 {
			return lister{lie{"authorized_keys", 0o600}}, nil
		}
		return lister(h.entries), nil
	case "Readlink":
		return lister{lie{name: "../victim"}}, nil
	}
	return lister{lie{"evil", fs.ModeDir | 0o755}}, nil
}

// serves returns what carries out a request of a session, or nil. There is a tar if it has
// an archive.
func (h hostile) serves(request string) func(ssh.Channel) {
	switch {
	case strings.HasSuffix(request, "sftp"):
		return func(ch ssh.Channel) { _ = sftp.NewRequestServer(ch, sftp.Handlers{FileGet: h, FileList: h}).Serve() }
	case h.archive != nil && strings.Contains(request, "tar -c"):
		return func(ch ssh.Channel) {
			_, _ = io.WriteString(ch, "lab-tar\n")
			_, _ = ch.Write(h.archive)
			_, _ = ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{0}))
		}
	}
	return nil
}

func TestHostileNames(t *testing.T) {
	host, key := newKey(t), newKey(t)
	for _, tc := range []struct {
		name    string
		entries []fs.FileInfo
		unsafe  bool // the others are made harmless: the sftp client cuts folders off names
	}{
		{"parent", []fs.FileInfo{lie{"../victim/x", 0o644}}, false},
		{"absolute", []fs.FileInfo{lie{"/tmp/x", 0o644}}, false},
		{"empty", []fs.FileInfo{lie{"", 0o644}, lie{"..", 0o644}}, false},
		{"nul", []fs.FileInfo{lie{"a\x00b", 0o644}}, true},
		{"folder through a link", []fs.FileInfo{lie{"x", fs.ModeSymlink}, lie{"x", fs.ModeDir | 0o755}}, false},
		{"file through a link", []fs.FileInfo{lie{"x", fs.ModeSymlink}, lie{"x", 0o644}}, false},
		{"set-uid", []fs.FileInfo{lie{"x", fs.ModeSetuid | 0o755}}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := serveHostile(t, host, key, hostile{entries: tc.entries})
			dir := t.TempDir()
			victim, target := filepath.Join(dir, "victim"), filepath.Join(dir, "target")
			for _, d := range []string{victim, target} {
				if err := os.Mkdir(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			err := c.Download(testContext(t), []string{"evil"}, target, guest.CopyOptions{})
			if got := errors.Is(err, guest.ErrUnsafeName); got != tc.unsafe {
				t.Errorf("error %v, want ErrUnsafeName: %v", err, tc.unsafe)
			}
			if left, err := os.ReadDir(victim); err != nil || len(left) > 0 {
				t.Errorf("it was written outside the target: %v, %v", left, err)
			}
			if fi, err := os.Stat(target + "/evil/x"); err == nil && fi.Mode()&fs.ModeSetuid != 0 {
				t.Error("the set-uid bit was copied")
			}
		})
	}
}

// serveHostile logs in to a server whose files are h's.
func serveHostile(t *testing.T, host, key guest.Key, h hostile) *guest.Client {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		sc := &ssh.ServerConfig{NoClientAuth: true}
		sc.AddHostKey(host.Signer)
		_, chans, reqs, err := ssh.NewServerConn(conn, sc)
		if err != nil {
			return
		}
		go ssh.DiscardRequests(reqs)
		for nc := range chans {
			ch, reqs, err := nc.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer ch.Close()
				for r := range reqs {
					serve := h.serves(string(r.Payload))
					_ = r.Reply(serve != nil, nil)
					if serve != nil {
						wg.Go(func() {
							serve(ch)
							ch.Close()
						})
					}
				}
			})
		}
	})
	c, err := guest.Connect(testContext(t), guest.Target{
		Machine: "evil", User: "root", Key: key.Signer, HostKey: host.Signer.PublicKey(),
		Dialers: guest.Dialers{Port: func(ctx context.Context, port uint16) (net.Conn, error) {
			if port != 22 {
				t.Errorf("port %d was dialled", port)
			}
			return net.Dial("unix", l.Addr().String())
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); l.Close(); wg.Wait() })
	return c
}

// An agent that lies is received by the same code: it neither writes what was not asked
// for, nor through a link that it made.
func TestHostileAgent(t *testing.T) {
	b := newBox(t)
	lies := filepath.Join(b.dir, "lies")
	b.agent.Files = []string{"/bin/sh", "-c", "read -r request; exec cat \"$0\"", lies} // what it is asked must be taken
	c := b.connect(t)
	for name, tc := range map[string]struct {
		sources []string
		entries []filestream.Entry
		want    error
	}{
		"dot file": {[]string{"logs/*"}, []filestream.Entry{{Kind: filestream.Count, Size: 1}, {Kind: filestream.File, Name: ".bashrc"}}, guest.ErrUnsafeName},
		"link": {[]string{"dir/.", "b"}, []filestream.Entry{
			{Kind: filestream.Count, Size: 2},
			{Kind: filestream.Dir, Name: "."},
			{Kind: filestream.Link, Name: "b", To: "../victim"},
			{Kind: filestream.Up},
			{Kind: filestream.File, Name: "b"},
		}, filestream.ErrLeadsOut},
	} {
		var stream bytes.Buffer
		e := filestream.NewEncoder(&stream)
		for _, x := range tc.entries {
			err := e.Entry(x)
			if x.Kind == filestream.File {
				err = errors.Join(err, e.Close(0))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		dir := t.TempDir()
		target := filepath.Join(dir, "target")
		err := errors.Join(e.End(filestream.Outcome{}), os.Mkdir(target, 0o755))
		if err := errors.Join(err, os.WriteFile(lies, stream.Bytes(), 0o644)); err != nil {
			t.Fatal(err)
		}
		if err := c.Download(testContext(t), tc.sources, target, guest.CopyOptions{}); !errors.Is(err, tc.want) {
			t.Errorf("%s: got %v, want %v", name, err, tc.want)
		}
		for _, f := range []string{"victim", "target/.bashrc"} {
			if _, err := os.Lstat(filepath.Join(dir, f)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: %s was written (%v)", name, f, err)
			}
		}
	}
}

// By sftp too, what is removed while its folder is copied is told, and the rest arrives.
func TestDownloadVanishing(t *testing.T) {
	c := serveHostile(t, newKey(t), newKey(t), hostile{entries: []fs.FileInfo{lie{"a", 0o644}, lie{"gone", 0o644}, lie{"z", 0o644}}})
	dir := t.TempDir()
	var skipped *guest.SkippedError
	err := c.Download(testContext(t), []string{"evil"}, dir, guest.CopyOptions{})
	if !errors.As(err, &skipped) || !slices.Equal(skipped.Vanished, []string{"evil/gone"}) || len(skipped.Paths) > 0 {
		t.Errorf("got %v, want evil/gone removed meanwhile", err)
	}
	if got, err := filepath.Glob(dir + "/evil/*"); err != nil || !slices.Equal(got, []string{dir + "/evil/a", dir + "/evil/z"}) {
		t.Errorf("arrived: %q, %v", got, err)
	}
}
