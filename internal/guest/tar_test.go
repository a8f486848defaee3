// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/guest/filestream"
)

// archive makes an archive of headers; a file has "gotcha" in it.
func archive(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		content := ""
		if h.Typeflag == tar.TypeReg {
			content = "gotcha"
		}
		h.Size, h.Format = int64(len(content)), tar.FormatGNU
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func plain(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644} }

func folder(name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}
}

func link(name, to string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
}

// What a guest's tar says is not believed: nothing is written but what is in the folder
// that was asked for.
func TestHostileTar(t *testing.T) {
	top := folder("./")
	deep := []tar.Header{top}
	for i := range 2 * filestream.MaxDepth {
		deep = append(deep, folder("./"+strings.Repeat("d/", i+1)))
	}
	huge := archive(t, top, plain("./x"))
	sparse := tar.Header{Typeflag: tar.TypeReg, Name: "./x", Mode: 0o644}
	for name, tc := range map[string]struct {
		archive []byte
		want    error // nil: harmless
	}{
		"fine":                  {archive(t, top, folder("./x/"), plain("./x/y"), plain("./z")), nil},
		"zeros":                 {make([]byte, 10240), guest.ErrDisconnected},
		"garbage":               {bytes.Repeat([]byte("garbage!"), 1024), filestream.ErrMalformed},
		"cut in a header":       {huge[:700], guest.ErrDisconnected},
		"cut in a file":         {huge[:1026], guest.ErrDisconnected},
		"without the folder":    {archive(t, plain("./x")), filestream.ErrMalformed},
		"the folder again":      {archive(t, top, plain("./x"), top), filestream.ErrMalformed},
		"the folder is a link":  {archive(t, link("./", "/etc")), filestream.ErrMalformed},
		"parent":                {archive(t, top, plain("./../victim/x")), filestream.ErrMalformed},
		"parent as folder":      {archive(t, top, folder("./../"), plain("./../x")), guest.ErrUnsafeName},
		"dots as a name":        {archive(t, top, plain("./..")), guest.ErrUnsafeName},
		"absolute":              {archive(t, top, plain("/tmp/x")), guest.ErrUnsafeName},
		"without a dot":         {archive(t, top, plain("x")), guest.ErrUnsafeName},
		"empty name":            {archive(t, top, link("./", "x")), filestream.ErrMalformed},
		"two slashes":           {archive(t, top, plain(".//x")), filestream.ErrMalformed},
		"without its folder":    {archive(t, top, plain("./a/b")), filestream.ErrMalformed},
		"without end":           {archive(t, deep...), filestream.ErrMalformed},
		"file through a link":   {archive(t, top, link("./x", "../../victim/x"), plain("./x")), filestream.ErrLeadsOut},
		"folder through a link": {archive(t, top, link("./x", "../../victim"), folder("./x/"), plain("./x/y")), filestream.ErrLeadsOut},
		"into a link":           {archive(t, top, link("./x", "../../victim"), plain("./x/y")), filestream.ErrMalformed},
		"hard link":             {archive(t, top, tar.Header{Typeflag: tar.TypeLink, Name: "./x", Linkname: "../../victim/x"}), filestream.ErrMalformed},
		"device":                {archive(t, top, tar.Header{Typeflag: tar.TypeChar, Name: "./x", Devmajor: 1, Devminor: 3}), errSkipped},
		"set-uid":               {archive(t, top, tar.Header{Typeflag: tar.TypeReg, Name: "./x", Mode: 0o4755}), nil},
		"holes by PAX":          {holes(t), filestream.ErrMalformed},
		"PAX":                   {foreign(t, tar.FormatPAX), filestream.ErrMalformed},
		"ustar":                 {foreign(t, tar.FormatUSTAR), filestream.ErrMalformed},
		"endless file":          {endless(t, sparse), filestream.ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			said := tc.archive
			if said == nil {
				said = []byte{}
			}
			c := serveHostile(t, newKey(t), newKey(t), hostile{archive: said})
			dir := t.TempDir()
			for _, d := range []string{"victim", "target"} {
				if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			err := c.Download(testContext(t), []string{"evil"}, dir+"/target", guest.CopyOptions{})
			var skipped *guest.SkippedError
			if errors.As(err, &skipped) {
				err = fmt.Errorf("%w: %w", errSkipped, err)
			}
			if !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			for d, want := range map[string]int{".": 2, "victim": 0} {
				if left, err := os.ReadDir(filepath.Join(dir, d)); err != nil || len(left) != want {
					t.Errorf("written outside the target: %v, %v", left, err)
				}
			}
			if fi, err := os.Stat(dir + "/target/evil/x"); err == nil && fi.Mode()&(fs.ModeSetuid|fs.ModeDevice) != 0 {
				t.Errorf("x is %v", fi.Mode())
			}
		})
	}
}

var errSkipped = errors.New("skipped")

// foreign is an archive in a format that was not asked for.
func foreign(t testing.TB, f tar.Format) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{folder("./"), plain("./x")} {
		if h.Format = f; f == tar.FormatPAX {
			h.PAXRecords = map[string]string{"LAB.x": "y"}
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// holes is an archive with an ordinary file that PAX records make one large hole.
func holes(t testing.TB) []byte {
	t.Helper()
	b := archive(t, folder("./"))[:512]
	size := strconv.Itoa(1 << 40)
	var records string
	for _, r := range []string{
		"GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.size=" + size, "GNU.sparse.numblocks=1", "GNU.sparse.map=" + size + ",0",
	} {
		n := len(r) + 3
		for len(strconv.Itoa(n))+len(r)+2 > n {
			n++
		}
		records += fmt.Sprintf("%d %s\n", n, r)
	}
	pax := archive(t, plain("./PaxHeaders/x"))[:512]
	pax[156] = tar.TypeXHeader
	copy(pax[124:136], fmt.Sprintf("%011o\x00", len(records)))
	file := archive(t, plain("./x"))
	copy(file[124:136], fmt.Sprintf("%011o\x00", 0))
	for _, head := range [][]byte{pax, file} {
		copy(head[257:265], "ustar\x0000")
		sum(head)
	}
	b = append(b, pax...)
	b = append(b, records...)
	b = append(b, make([]byte, -len(records)&511)...)
	b = append(b, file[:512]...)
	return append(b, make([]byte, 1024)...)
}

// sum writes the checksum of a header.
func sum(head []byte) {
	copy(head[148:156], "        ")
	sum := 0
	for _, x := range head[:512] {
		sum += int(x)
	}
	copy(head[148:156], fmt.Sprintf("%06o\x00 ", sum))
}

// endless is an archive with a file that has more bytes than a disk can.
func endless(t *testing.T, h tar.Header) []byte {
	b := archive(t, folder("./"), h)
	size := b[512+124 : 512+136]
	copy(size, "\x80\x00\x00\x00\x40\x00\x00\x00\x00\x00\x00\x00")
	sum(b[512:1024])
	return b
}

// Names of bytes that are no text, and times before 1970, arrive as they are.
func TestCopyOddNames(t *testing.T) { bothWays(t, testCopyOddNames) }

func testCopyOddNames(t *testing.T, b *box) {
	c := b.connect(t)
	src, back := t.TempDir(), t.TempDir()
	names := []string{"-rf", "\xff\xfe", "a\nb", "tar: x", " ", "*", "$(touch x)", strings.Repeat("n", 255), "ä"}
	for _, name := range names {
		p := filepath.Join(src, name)
		if err := errors.Join(os.WriteFile(p, []byte(name), 0o600), os.Chtimes(p, time.Unix(1, 0), time.Unix(1, 0))); err != nil {
			t.Fatal(err)
		}
	}
	long := filepath.Join(append([]string{src}, slices.Repeat([]string{strings.Repeat("d", 50)}, 10)...)...)
	if err := errors.Join(os.MkdirAll(long, 0o755), os.Symlink(strings.Repeat("../", 60)+"x", filepath.Join(long, "link"))); err != nil {
		t.Fatal(err)
	}
	if err := c.Upload(testContext(t), []string{src + "/."}, "odd names", guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := c.Download(testContext(t), []string{"odd names/."}, back, guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	want := withoutTop(listing(t, src))
	for _, dir := range []string{filepath.Join(b.home, "odd names"), back} {
		if got := withoutTop(listing(t, dir)); got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
	}
}

// withoutTop drops the line of the folder itself, whose time differs.
func withoutTop(listing string) string {
	_, rest, _ := strings.Cut(listing, "\n")
	return rest
}

// What is there already is treated as cp does it: a folder never takes the place of a
// file, nor a file that of a folder; a file is written through a link; a link to a folder
// stays.
func TestCopyOntoOthers(t *testing.T) { bothWays(t, testCopyOntoOthers) }

func testCopyOntoOthers(t *testing.T, b *box) {
	c := b.connect(t)
	src := t.TempDir()
	makeFiles(t, src, "dir/file", "plain", "through")
	for name, make := range map[string]func(dst string) error{
		"folder onto file": func(dst string) error { return os.WriteFile(dst+"/dir", []byte("precious"), 0o600) },
		"file onto folder": func(dst string) error { return os.Mkdir(dst+"/plain", 0o755) },
		"fine": func(dst string) error {
			return errors.Join(os.Mkdir(dst+"/other", 0o755), os.Symlink("other", dst+"/dir"),
				os.WriteFile(dst+"/real", []byte("longer than the copy"), 0o600), os.Symlink("real", dst+"/through"))
		},
	} {
		dst := filepath.Join(b.home, name)
		if err := errors.Join(os.Mkdir(dst, 0o755), make(dst)); err != nil {
			t.Fatal(err)
		}
		before := listing(t, dst)
		err := c.Upload(testContext(t), []string{src + "/."}, name, guest.CopyOptions{})
		if name != "fine" {
			for line := range strings.Lines(before) {
				if !strings.HasPrefix(line, "d") && !strings.Contains(listing(t, dst), strings.TrimSpace(line)) {
					t.Errorf("%s: %q is gone", name, line)
				}
			}
			if err == nil {
				t.Errorf("%s: it succeeded:\n%s", name, listing(t, dst))
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for path, want := range map[string]string{"other/file": "dir/file", "real": "through", "plain": "plain"} {
			if got, err := os.ReadFile(filepath.Join(dst, path)); err != nil || string(got) != want {
				t.Errorf("%s: %s has %q, %v", name, path, got, err)
			}
		}
		for _, path := range []string{"dir", "through"} {
			if fi, err := os.Lstat(filepath.Join(dst, path)); err != nil || fi.Mode().Type() != fs.ModeSymlink {
				t.Errorf("%s: %s is no link any more: %v, %v", name, path, fi, err)
			}
		}
	}
}

// makeFiles makes files that hold their own names.
func makeFiles(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, name := range names {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(name), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
}

// A file with several names becomes several files, whatever carries it.
func TestCopyHardLinks(t *testing.T) { bothWays(t, testCopyHardLinks) }

func testCopyHardLinks(t *testing.T, b *box) {
	c := b.connect(t)
	src, back := t.TempDir(), t.TempDir()
	makeFiles(t, src, "one")
	if err := os.Link(src+"/one", src+"/two"); err != nil {
		t.Fatal(err)
	}
	if err := c.Upload(testContext(t), []string{src}, "links", guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(b.home+"/links/one", b.home+"/links/three"); err != nil {
		t.Fatal(err)
	}
	if err := c.Download(testContext(t), []string{"links"}, back, guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, pair := range [][2]string{{b.home + "/links/one", b.home + "/links/two"}, {back + "/links/one", back + "/links/three"}} {
		one, err := os.Stat(pair[0])
		two, err2 := os.Stat(pair[1])
		if err := errors.Join(err, err2); err != nil || os.SameFile(one, two) {
			t.Errorf("%q are one file, or: %v", pair, err)
		}
		if got, err := os.ReadFile(pair[1]); err != nil || string(got) != "one" {
			t.Errorf("%s has %q, %v", pair[1], got, err)
		}
	}
}

// A folder that tar cannot copy goes by sftp, with all that is in it; the next does not.
func TestCopyOneFolderWithoutTar(t *testing.T) {
	real, err := exec.LookPath("tar")
	if err != nil {
		t.Skip(err)
	}
	b := newBox(t)
	b.agent.Files = nil
	log := filepath.Join(b.dir, "tars")
	b.instead(t, "tar", `case "$*" in *--version*) ;; *) pwd >>'`+log+`' ;; esac; exec `+real+` "$@"`)
	b.without(t, "xargs") // what is in the way is found with it
	b.instead(t, "sh", `case $4 in *locked) set -- "$1" "$2" "$3" /nowhere ;; esac; exec /bin/sh "$@"`)
	c := b.connect(t)
	src, back := t.TempDir(), t.TempDir()
	makeFiles(t, src, "one/sub/file", "two/sub/file", "locked/sub/file", "open/sub/file")
	makeFiles(t, b.home, "there/one/old")
	tars := func(when string, want ...string) {
		t.Helper()
		got, err := os.ReadFile(log)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if got := strings.Fields(string(got)); !slices.Equal(got, want) {
			t.Errorf("%s: tar ran in %q, want %q", when, got, want)
		}
	}
	if err := c.Upload(testContext(t), []string{src + "/one", src + "/two", src + "/locked", src + "/open"}, "there", guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	up := []string{b.home + "/there/two", b.home + "/there/open"}
	tars("to the guest", up...)
	if err := c.Download(testContext(t), []string{"there/locked", "there/open"}, back, guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	tars("from the guest", append(up, b.home+"/there/open")...)
	for _, name := range []string{b.home + "/there/one/sub/file", b.home + "/there/one/old", b.home + "/there/two/sub/file", back + "/locked/sub/file", back + "/open/sub/file"} {
		if _, err := os.Stat(name); err != nil {
			t.Error(err)
		}
	}
}
