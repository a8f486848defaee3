// SPDX-License-Identifier: Apache-2.0

package source_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/boxes/source"
)

// fixture is a resolver with a store of its own.
type fixture struct {
	*source.Resolver
	t *testing.T
}

func newFixture(t *testing.T) fixture {
	t.Helper()
	dir := t.TempDir()
	store, err := boxes.Open(filepath.Join(dir, "boxes"))
	if err != nil {
		t.Fatal(err)
	}
	r := &source.Resolver{Store: store, Cache: filepath.Join(dir, "cache"), Stall: 20 * time.Second}
	r.SetBackoff(time.Millisecond)
	return fixture{r, t}
}

// files lists what is below dir, without the hash in a partial download's name.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || path == dir {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		name := e.Name()
		if e.IsDir() {
			name = strings.TrimLeft(name, "0123456789abcdef")
		} else {
			name = fmt.Sprintf("%s %d", name, fi.Size())
		}
		list = append(list, name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// wantNothingKept fails if the store holds a box, or the cache anything.
func (f fixture) wantNothingKept() {
	f.t.Helper()
	entries, err := f.Store.List(context.Background())
	if err != nil || len(entries) != 0 {
		f.t.Errorf("the store holds %+v (%v), want nothing", entries, err)
	}
	if got := files(f.t, filepath.Join(f.Store.Dir(), "blobs")); !cmp.Equal(got, []string{"sha"}) && !cmp.Equal(got, []string{"sha256"}) {
		f.t.Errorf("blobs hold %q, want nothing", got)
	}
	f.wantCache()
}

func (f fixture) wantCache(want ...string) {
	f.t.Helper()
	if diff := cmp.Diff(want, files(f.t, f.Cache)); diff != "" {
		f.t.Errorf("cache (-want +got)\n%s", diff)
	}
}

func wantError(t *testing.T, err, is error, message, hint string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if is != nil && !errors.Is(err, is) {
		t.Errorf("error %v does not wrap %v", err, is)
	}
	if err.Error() != message {
		t.Errorf("error\n got %s\nwant %s", err, message)
	}
	var h interface{ Hint() string }
	got := ""
	if errors.As(err, &h) {
		got = h.Hint()
	}
	if got != hint {
		t.Errorf("hint\n got %s\nwant %s", got, hint)
	}
}

// content is a raw disk of some size, without repetition.
var content = func() []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < 3<<20; i++ {
		fmt.Fprintf(&b, "%07d\x01", i)
	}
	return b.Bytes()
}()

func writeDisk(t *testing.T, dir, name string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLocal(t *testing.T) {
	sha256, sha512 := digest.FromBytes(content), digest.SHA512.FromBytes(content)
	for _, ref := range []string{"./disk.img", "disk.img", "DIR/disk.img", "file://DIR/disk.img", "../BASE/disk.img"} {
		for _, checksum := range []string{"", sha256.String(), sha256.Encoded(), strings.ToUpper(sha512.Encoded()), sha512.String(), "file:SUMS", "file:DIR/SUMS", "file://DIR/SUMS"} {
			t.Run(ref+" "+checksum, func(t *testing.T) {
				f := newFixture(t)
				dir := t.TempDir()
				writeDisk(t, dir, "disk.img")
				sums := fmt.Sprintf("%s  other.img\n%s *disk.img\n", strings.Repeat("0", 64), sha256.Encoded())
				if err := os.WriteFile(filepath.Join(dir, "SUMS"), []byte(sums), 0o600); err != nil {
					t.Fatal(err)
				}
				expand := strings.NewReplacer("DIR", dir, "BASE", filepath.Base(dir)).Replace
				got, err := f.Resolve(t.Context(), source.Request{Ref: expand(ref), BaseDir: dir, Checksum: expand(checksum), Offline: true, Name: "mine"})
				if err != nil {
					t.Fatal(err)
				}
				want := sha256.String()
				if strings.Contains(strings.ToLower(checksum), sha512.Encoded()) {
					want = sha512.String()
				}
				if got.Checksum != want || !got.Fetched {
					t.Errorf("Checksum = %s, Fetched = %v, want %s, true", got.Checksum, got.Fetched, want)
				}
				if c := got.Box.Config; c.Format != "raw" || c.Size != int64(len(content)) || c.Architecture != runtime.GOARCH || !c.CloudInit {
					t.Errorf("Config = %+v", c)
				}
				if b, err := f.Store.Get(t.Context(), "mine"); err != nil || b.Digest != got.Box.Digest {
					t.Errorf("Get by name = %v, %v", b.Digest, err)
				}
				f.wantCache()
			})
		}
	}
}

func TestResolveRefuses(t *testing.T) {
	dir := t.TempDir()
	path := writeDisk(t, dir, "disk.img")
	writeDisk(t, dir, "nodot")
	vmdk := filepath.Join(dir, "disk.vmdk")
	if err := os.WriteFile(vmdk, append([]byte("KDMV"), content...), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "SUMS"), []byte("hello\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	sum := digest.FromBytes(content)
	zeros := strings.Repeat("0", 64)
	const (
		checksumHint = "give it as sha256:HEX, sha512:HEX, or file:URL of a SHA256SUMS file"
		compare      = "compare the checksum with the one that the image's publisher names"
	)
	tests := []struct {
		name string
		req  source.Request
		is   error
		want string // without what it is wrapped in
		hint string
	}{
		{"empty", source.Request{}, nil, "the reference is empty", ""},
		{"unknown scheme", source.Request{Ref: "s3://user:secret@bucket/key?token=secret"}, nil, `"s3" URLs are not supported`, "use http, https or file, or download the image yourself"},
		{"forced getter", source.Request{Ref: "git::https://example.com/x"}, nil, `references of the form "git::…" are not supported`, "use a plain http or https URL"},
		{"malformed URL", source.Request{Ref: "https://user:sec ret@host/"}, nil, "the URL is malformed", ""},
		{"no host", source.Request{Ref: "https:///x"}, nil, "the URL names no host", ""},
		{"file URL with a host", source.Request{Ref: "file://elsewhere/x"}, nil, "a file URL must name an absolute path on this host", "write file:///path/to/disk.qcow2"},
		{"relative path without a base", source.Request{Ref: "./x"}, nil, "a relative path was given, but nothing that it is relative to", ""},
		{"missing file", source.Request{Ref: dir + "/none.img"}, fs.ErrNotExist, "adding disk: open " + dir + "/none.img: no such file or directory", ""},
		{
			"unsafe file",
			source.Request{Ref: vmdk},
			boxes.ErrUnsafe, "adding disk " + vmdk + ": unsafe disk image: the file is a VMware disk (VMDK), not a qcow2 or raw disk",
			"convert it first: qemu-img convert -f vmdk -O qcow2 IN OUT",
		},
		{"unknown name", source.Request{Ref: "mybox", BaseDir: dir}, boxes.ErrNotFound, `box "mybox": no such box`, "see which boxes there are: lab box list"},
		{"a file, not a name", source.Request{Ref: "nodot", BaseDir: dir}, boxes.ErrNotFound, `box "nodot": no such box`, "if the file is meant, write ./nodot"},
		{"unknown digest", source.Request{Ref: "sha256:" + zeros}, boxes.ErrNotFound, `box "sha256:` + zeros + `": no such box`, "see which boxes there are: lab box list"},
		{"name with a checksum", source.Request{Ref: "mybox", Checksum: zeros}, nil, `"mybox" names a box, not a file that could have a checksum`, "remove the checksum: a box in the store is checked by its digest"},
		{
			"wrong checksum",
			source.Request{Ref: path, Checksum: zeros},
			boxes.ErrDigest,
			"adding disk " + path + ": digest does not match: the checksum is " + sum.String() + ", expected sha256:" + zeros, compare,
		},
		{"short checksum", source.Request{Ref: path, Checksum: "sha256:abc"}, nil, `"sha256:abc" is not a sha256 or sha512 checksum`, checksumHint},
		{"checksum of the wrong length", source.Request{Ref: path, Checksum: "sha512:" + zeros}, nil, `"sha512:` + zeros + `" is not a sha256 or sha512 checksum`, checksumHint},
		{"weak checksum", source.Request{Ref: path, Checksum: "md5:d41d8cd98f00b204e9800998ecf8427e"}, nil, "the checksum uses md5, which can be forged", checksumHint},
		{"no checksum in the file", source.Request{Ref: path, Checksum: "file:SUMS", BaseDir: dir}, nil, `reading checksums from SUMS: it has no checksum for "disk.img"`, checksumHint},
		{"no file of checksums", source.Request{Ref: path, Checksum: "file:" + dir + "/none"}, fs.ErrNotExist, "reading checksums from " + dir + "/none: open " + dir + "/none: no such file or directory", ""},
		{"a pipe of checksums", source.Request{Ref: path, Checksum: "file:" + pipe}, nil, "reading checksums from " + pipe + ": " + pipe + " is a named pipe, not a file", ""},
		{"checksums offline", source.Request{Ref: path, Checksum: "file:https://u:p@example.com/SUMS?token=secret", Offline: true}, source.ErrOffline, "reading checksums from https://example.com/SUMS?…: not available offline", ""},
		{"URL offline", source.Request{Ref: "https://u:p@example.com/x.img?token=secret", Offline: true}, source.ErrOffline, "not available offline: the box has not been downloaded yet", "run once without --offline"},
		{"built-in offline", source.Request{Ref: "builtin/tiny", Offline: true}, source.ErrOffline, "not available offline: the box has not been built yet", "run once without --offline"},
		{"built-in without a builder", source.Request{Ref: "builtin/tiny"}, boxes.ErrNotFound, "no such box, and nothing here can build it", ""},
		{"built-in with a checksum", source.Request{Ref: "builtin/tiny", Checksum: zeros}, nil, "a built-in box is built here: there is no file that could have a checksum", "remove the checksum"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			_, err := f.Resolve(t.Context(), tt.req)
			shown := map[string]string{
				"unknown scheme": "s3://bucket/key?…",
				"malformed URL":  "https://…",
				"URL offline":    "https://example.com/x.img?…",
			}[tt.name]
			if shown == "" {
				shown = tt.req.Ref
			}
			wantError(t, err, tt.is, fmt.Sprintf("resolving box %q: %s", shown, tt.want), tt.hint)
			f.wantNothingKept()
		})
	}
}

func TestPin(t *testing.T) {
	f := newFixture(t)
	dir := t.TempDir()
	path := writeDisk(t, dir, "disk.img")
	first, err := f.Resolve(t.Context(), source.Request{Ref: path})
	if err != nil {
		t.Fatal(err)
	}
	// The pinned box is used, whatever became of what it was made from.
	if err := os.WriteFile(path, content[:1<<20], 0o600); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{path, "https://example.com/x.img", "builtin/tiny", "mybox"} {
		got, err := f.Resolve(t.Context(), source.Request{Ref: ref, Pin: first.Box.Digest, Offline: true})
		if err != nil {
			t.Fatal(err)
		}
		if got.Box.Digest != first.Box.Digest || got.Fetched {
			t.Errorf("Resolve(%q) = %+v", ref, got)
		}
	}
	// A checksum that contradicts it is not passed over.
	zeros := strings.Repeat("0", 64)
	_, err = f.Resolve(t.Context(), source.Request{Ref: path, Pin: first.Box.Digest, Checksum: zeros})
	wantError(t, err, boxes.ErrDigest, fmt.Sprintf("resolving box %q: digest does not match: the checksum is %s, expected sha256:%s", path, digest.FromBytes(content), zeros),
		"the file is not the one that was pinned; if the change is welcome, correct the checksum in the Labfile, if it has one, and accept it: lab lock --update")

	// Without the box, what there is must be what the pin says.
	other := newFixture(t)
	changed, err := newFixture(t).Resolve(t.Context(), source.Request{Ref: path})
	if err != nil {
		t.Fatal(err)
	}
	_, err = other.Resolve(t.Context(), source.Request{Ref: path, Pin: first.Box.Digest})
	wantError(t, err, boxes.ErrDigest, fmt.Sprintf("resolving box %q: adding box: digest does not match: the box is %s, expected %s", path, changed.Box.Digest, first.Box.Digest),
		"the lock file pins another box; if the change is welcome, accept it: lab lock --update")
	other.wantNothingKept()
	writeDisk(t, dir, "disk.img")
	if got, err := other.Resolve(t.Context(), source.Request{Ref: path, Pin: first.Box.Digest}); err != nil || got.Box.Digest != first.Box.Digest {
		t.Errorf("Resolve = %+v, %v", got, err)
	}

	// A box that lost a file is fetched again.
	if err := os.Remove(first.Box.Disk.Path); err != nil {
		t.Fatal(err)
	}
	if got, err := f.Resolve(t.Context(), source.Request{Ref: path, Pin: first.Box.Digest}); err != nil || !got.Fetched {
		t.Errorf("Resolve of a damaged box = %+v, %v", got, err)
	}
	if err := f.Store.Verify(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

func TestStored(t *testing.T) {
	f := newFixture(t)
	first, err := f.Resolve(t.Context(), source.Request{Ref: writeDisk(t, t.TempDir(), "disk.img"), Name: "mybox"})
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"mybox", first.Box.Digest.String(), first.Box.Digest.Encoded()[:12]} {
		got, err := f.Resolve(t.Context(), source.Request{Ref: ref, Name: "other"})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(source.Result{Box: first.Box}, got); diff != "" {
			t.Errorf("Resolve(%q) (-want +got)\n%s", ref, diff)
		}
		if b, err := f.Store.Get(t.Context(), "other"); err != nil || b.Digest != first.Box.Digest {
			t.Errorf("Get by the new name = %v, %v", b.Digest, err)
		}
	}
	pin := digest.FromString("another")
	_, err = f.Resolve(t.Context(), source.Request{Ref: "mybox", Pin: pin})
	wantError(t, err, boxes.ErrDigest, fmt.Sprintf(`resolving box "mybox": digest does not match: the box is %s, expected %s`, first.Box.Digest, pin),
		"the lock file pins another box; if the change is welcome, accept it: lab lock --update")
}

// maker builds boxes of one small disk, and counts.
type maker struct {
	store *boxes.Store
	path  string
	built []string
}

func (m *maker) Build(ctx context.Context, name string, p source.Progress) (boxes.Box, error) {
	m.built = append(m.built, name)
	p("installing packages", 1, 2)
	return m.store.Ingest(ctx, boxes.Ingredients{Disk: m.path}, "builtin/"+name)
}

func TestBuiltin(t *testing.T) {
	f := newFixture(t)
	m := &maker{store: f.Store, path: writeDisk(t, t.TempDir(), "disk.img")}
	f.Builder = m
	var progress []string
	req := source.Request{Ref: "builtin/tiny", Progress: func(stage string, done, total int64) {
		progress = append(progress, fmt.Sprintf("%s %d/%d", stage, done, total))
	}}
	first, err := f.Resolve(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if !first.Fetched || first.Checksum != "" {
		t.Errorf("Resolve = %+v", first)
	}
	again, err := f.Resolve(t.Context(), source.Request{Ref: "builtin/tiny", Offline: true})
	if err != nil || again.Fetched || again.Box.Digest != first.Box.Digest {
		t.Errorf("Resolve again = %+v, %v", again, err)
	}
	if diff := cmp.Diff([]string{"tiny"}, m.built); diff != "" {
		t.Errorf("built (-want +got)\n%s", diff)
	}
	if diff := cmp.Diff([]string{"installing packages 1/2"}, progress); diff != "" {
		t.Errorf("progress (-want +got)\n%s", diff)
	}
	pin := digest.FromString("older packages")
	_, err = f.Resolve(t.Context(), source.Request{Ref: "builtin/tiny", Pin: pin})
	wantError(t, err, boxes.ErrDigest, fmt.Sprintf(`resolving box "builtin/tiny": digest does not match: the box is %s, expected %s`, first.Box.Digest, pin),
		"the lock file pins another box; if the change is welcome, accept it: lab lock --update")
}

func TestRedact(t *testing.T) {
	for ref, want := range map[string]string{
		"mybox":                                   "mybox",
		"./disk.img":                              "./disk.img",
		"https://example.com/a.img":               "https://example.com/a.img",
		"https://u:secret@example.com/a.img?k=v":  "https://example.com/a.img?…",
		"https://u@example.com:8443/a.img#f":      "https://example.com:8443/a.img",
		"https://u:sec ret@example.com/a.img?k=v": "https://…",
	} {
		if got := source.Redact(ref); got != want {
			t.Errorf("Redact(%q) = %q, want %q", ref, got, want)
		}
	}
}

func TestFindSum(t *testing.T) {
	a, b := strings.Repeat("a", 64), strings.Repeat("b", 64)
	long := strings.Repeat("c", 128)
	tests := []struct {
		name, sums, path string
		want, err        string
	}{
		{"GNU", b + "  other.img\n" + a + "  disk.img\n", "/x/disk.img", "sha256:" + a, ""},
		{"GNU binary, CRLF", a + " *disk.img\r\n", "/x/disk.img", "sha256:" + a, ""},
		{"dot slash", a + "  ./disk.img\n", "/x/disk.img", "sha256:" + a, ""},
		{"folder", a + "  y/disk.img\n" + b + "  x/disk.img\n", "/x/disk.img", "sha256:" + b, ""},
		{"name with spaces", a + "  my disk.img\n", "/x/my disk.img", "sha256:" + a, ""},
		{"sha512", long + "  disk.img\n", "/disk.img", "sha512:" + long, ""},
		{"BSD", "SHA256 (disk.img) = " + a + "\n", "/disk.img", "sha256:" + a, ""},
		{"both", "SHA512 (disk.img) = " + long + "\nSHA256 (disk.img) = " + a + "\nMD5 (disk.img) = " + a[:32] + "\n", "/disk.img", "sha256:" + a, ""},
		{"alone", a + "\n", "/disk.img", "sha256:" + a, ""},
		{"signed", "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n# comment\n" + a + "  disk.img\n-----BEGIN PGP SIGNATURE-----\n", "/disk.img", "sha256:" + a, ""},
		{"name that ends alike", a + "  mydisk.img\n" + b + "  disk.img\n", "/x/disk.img", "sha256:" + b, ""},
		{"one space", a + " disk.img\n", "/x/disk.img", "sha256:" + a, ""},
		{"tab", a + "\tdisk.img\n", "/x/disk.img", "sha256:" + a, ""},
		{"indented", "  " + a + "  disk.img\n", "/x/disk.img", "sha256:" + a, ""},
		{"escaped", `\` + a + `  a\\b.img` + "\n", `/x/a\b.img`, "sha256:" + a, ""},
		{"OpenSSL 1", "SHA256(disk.img)= " + a + "\n", "/disk.img", "sha256:" + a, ""},
		{"other algorithms of that length", "SHA3-256(disk.img)= " + b + "\nSHA512/256 (disk.img) = " + b + "\nSHA256 (disk.img) = " + a + "\n", "/disk.img", "sha256:" + a, ""},
		{"another algorithm alone", "SHA3-256(disk.img)= " + b + "\n", "/disk.img", "", `it has no sha256 or sha512 checksum for "disk.img"`},
		{"OpenSSL 3", "SHA2-256(disk.img)= " + a + "\n", "/disk.img", "sha256:" + a, ""},
		{"OpenSSL 3, SHA-512", "SHA2-512(x/disk.img)= " + long + "\n", "/x/disk.img", "sha512:" + long, ""},
		{"byte order mark", "\ufeff" + a + "  disk.img\n", "/x/disk.img", "sha256:" + a, ""},
		{"foreign path", a + "  /home/runner/up/disk.img\n" + b + "  /home/runner/up/other.img\n", "/x/disk.img", "sha256:" + a, ""},
		{"foreign path of Windows", a + ` *C:\up\disk.img` + "\r\n", "/x/disk.img", "sha256:" + a, ""},
		{"own before foreign path", a + "  /up/disk.img\n" + b + "  disk.img\n" + a + "  /other/disk.img\n", "/x/disk.img", "sha256:" + b, ""},
		{"two foreign paths", a + "  /up/disk.img\n" + b + "  /other/disk.img\n", "/x/disk.img", "", `it has several checksums that may be meant for "disk.img"`},
		{"standard input", a + "  -\n", "/x/disk.img", "sha256:" + a, ""},
		{"part of a name", a + "  disk\n", "/x/disk.img", "", `it has no checksum for "disk.img"`},
		{"twice the same", a + "  disk.img\n" + a + "  disk.img\n", "/disk.img", "sha256:" + a, ""},
		{"ambiguous", a + "  disk.img\n" + b + "  x/disk.img\n", "/x/disk.img", "", `it has several checksums that may be meant for "disk.img"`},
		{"only weak", a[:40] + "  disk.img\n", "/disk.img", "", `it has no sha256 or sha512 checksum for "disk.img"`},
		{"empty", "", "/disk.img", "", `it has no checksum for "disk.img"`},
		{"web page", "<html>\n", "/disk.img", "", `it has no checksum for "disk.img"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := source.FindSum([]byte(tt.sums), tt.path)
			message := ""
			if err != nil {
				message = err.Error()
			}
			if got.String() != tt.want || message != tt.err {
				t.Errorf("got %q, error %q; want %q, error %q", got, message, tt.want, tt.err)
			}
		})
	}
}
