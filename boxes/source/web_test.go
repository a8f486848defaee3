// SPDX-License-Identifier: Apache-2.0

package source_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/boxes/source"
)

// site serves one file and can misbehave.
type site struct {
	*httptest.Server
	mu       sync.Mutex
	body     []byte
	header   http.Header // sent with every reply
	cut      int         // bytes after which the next reply ends; 0 for never
	cuts     int         // how many replies are cut; -1 for all
	noRanges bool        // answers with 200 whatever was asked
	requests []string    // "GET /disk.img?x=y Range If-Range"
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{body: content, header: http.Header{"Etag": {`"v1"`}}}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, strings.TrimSpace(fmt.Sprintf("%s %s %s %s", r.Method, r.URL, r.Header.Get("Range"), r.Header.Get("If-Range"))))
	for k, v := range s.header {
		w.Header()[k] = v
	}
	if s.noRanges {
		r.Header.Del("Range")
	}
	if s.cut > 0 && s.cuts != 0 {
		s.cuts--
		w = &cutter{w, s.cut}
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(s.body))
}

// cutter breaks the connection after some bytes of the body.
type cutter struct {
	http.ResponseWriter
	left int
}

func (c *cutter) Write(b []byte) (int, error) {
	if len(b) < c.left {
		c.left -= len(b)
		return c.ResponseWriter.Write(b)
	}
	c.ResponseWriter.Write(b[:c.left])
	http.NewResponseController(c.ResponseWriter).Flush()
	panic(http.ErrAbortHandler)
}

func (s *site) wantRequests(t *testing.T, want ...string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if diff := cmp.Diff(want, s.requests); diff != "" {
		t.Errorf("requests (-want +got)\n%s", diff)
	}
}

func (f fixture) wantBox(res source.Result, err error, disk []byte) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
	got, err := os.ReadFile(res.Box.Disk.Path)
	if err != nil {
		f.t.Fatal(err)
	}
	if !bytes.Equal(got, disk) {
		f.t.Errorf("the box's disk is not what was served: %d bytes, want %d", len(got), len(disk))
	}
	if want := digest.FromBytes(disk).String(); res.Checksum != want {
		f.t.Errorf("Checksum = %s, want %s", res.Checksum, want)
	}
	f.wantCache()
}

func TestDownload(t *testing.T) {
	s, f := newSite(t), newFixture(t)
	var last string
	ref := "http://user:secret@" + strings.TrimPrefix(s.URL, "http://") + "/disk.img?token=secret#top"
	res, err := f.Resolve(t.Context(), source.Request{Ref: ref, Progress: func(stage string, done, total int64) {
		last = fmt.Sprintf("%s %d/%d", stage, done, total)
	}})
	f.wantBox(res, err, content)
	if want := fmt.Sprintf("adding to the store %d/%d", len(content), len(content)); last != want {
		t.Errorf("last progress = %q, want %q", last, want)
	}
	s.wantRequests(t, "GET /disk.img?token=secret")
	entries, err := f.Store.List(t.Context())
	if err != nil || len(entries) != 1 || entries[0].Origin != s.URL+"/disk.img?…" {
		t.Errorf("List = %+v, %v", entries, err)
	}
}

// What go-getter would obey in a URL is sent to the server like the rest of it.
func TestDownloadObeysNothingInURL(t *testing.T) {
	for _, path := range []string{
		"/disk.img?archive=tar.gz", "/disk.img?checksum=md5:00", "/disk.img?checksum=file:http://127.0.0.1:1/x", "/disk.img?filename=../../evil",
		"/a//sub/disk.img", "/a//../../etc/disk.img", "/disk.tar.gz", "/disk.zip?archive=zip", "/disk.img?terraform-get=1", "/",
	} {
		t.Run(path, func(t *testing.T) {
			s, f := newSite(t), newFixture(t)
			s.header.Set("X-Terraform-Get", "file:///etc/passwd")
			res, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + path})
			f.wantBox(res, err, content)
			s.wantRequests(t, "GET "+path)
		})
	}
}

func TestDownloadChecksum(t *testing.T) {
	sum := digest.FromBytes(content)
	for _, checksum := range []string{sum.String(), digest.SHA512.FromBytes(content).String()} {
		s, f := newSite(t), newFixture(t)
		res, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img", Checksum: checksum})
		if err != nil || res.Checksum != checksum || !res.Fetched {
			t.Errorf("Resolve = %+v, %v", res, err)
		}
	}
	t.Run("known", func(t *testing.T) {
		s, f := newSite(t), newFixture(t)
		if _, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"}); err != nil {
			t.Fatal(err)
		}
		// What the store has by its checksum is not fetched from anywhere.
		res, err := f.Resolve(t.Context(), source.Request{Ref: "https://elsewhere.invalid/x", Checksum: sum.String(), Offline: true})
		if err != nil || res.Fetched {
			t.Errorf("Resolve = %+v, %v", res, err)
		}
		config := source.DefaultConfig()
		config.User = "somebody"
		_, err = f.Resolve(t.Context(), source.Request{Ref: "https://elsewhere.invalid/x", Checksum: sum.String(), Config: &config, Offline: true})
		if !errors.Is(err, source.ErrOffline) {
			t.Errorf("a box with another config: error = %v, want ErrOffline", err)
		}
	})
	t.Run("wrong", func(t *testing.T) {
		s, f := newSite(t), newFixture(t)
		wrong := digest.FromString("wrong")
		_, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img", Checksum: wrong.String()})
		if !errors.Is(err, boxes.ErrDigest) || !strings.HasSuffix(err.Error(), fmt.Sprintf(": digest does not match: the checksum is %s, expected %s", sum, wrong)) {
			t.Errorf("error = %v", err)
		}
		f.wantNothingKept()
	})
	t.Run("file", func(t *testing.T) {
		s, f := newSite(t), newFixture(t)
		sums := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s  disk.img\n", sum.Encoded())
		}))
		defer sums.Close()
		res, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/images/disk.img", Checksum: "file:" + sums.URL + "/SHA256SUMS"})
		f.wantBox(res, err, content)
		_, err = f.Resolve(t.Context(), source.Request{Ref: s.URL + "/images/other.img", Checksum: "file:" + sums.URL + "/SHA256SUMS?token=secret"})
		wantError(t, err, nil, fmt.Sprintf(`resolving box "%s/images/other.img": reading checksums from %s/SHA256SUMS?…: it has no checksum for "other.img"`, s.URL, sums.URL),
			"give it as sha256:HEX, sha512:HEX, or file:URL of a SHA256SUMS file")
	})
	t.Run("endless file", func(t *testing.T) {
		s, f := newSite(t), newFixture(t)
		sums := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, zeros{}) }))
		defer sums.Close()
		_, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img", Checksum: "file:" + sums.URL})
		wantError(t, err, nil, fmt.Sprintf(`resolving box "%s/disk.img": reading checksums from %s: it is larger than 4194304 bytes`, s.URL, sums.URL), "")
		s.wantRequests(t)
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

const cutAt = 1 << 20

func TestResumeWithinOneCall(t *testing.T) {
	s, f := newSite(t), newFixture(t)
	s.cut, s.cuts = cutAt, 2
	res, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"})
	f.wantBox(res, err, content)
	s.wantRequests(t, "GET /disk.img", `GET /disk.img bytes=1048576- "v1"`, `GET /disk.img bytes=2097152- "v1"`)
}

// A raw disk that is mostly zeros takes no room for them, whether it comes in one piece or
// is cut off within them.
func TestSparseDownload(t *testing.T) {
	const size = 24 << 20
	disk := make([]byte, size)
	copy(disk, content[:cutAt/2])
	disk[size-1] = 'x'
	for _, cuts := range []int{0, 2} {
		s, f := newSite(t), newFixture(t)
		s.body, s.cut, s.cuts = disk, cutAt, cuts
		res, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"})
		f.wantBox(res, err, disk)
		fi, err := os.Stat(res.Box.Disk.Path)
		if err != nil {
			t.Fatal(err)
		}
		if takes := fi.Sys().(*syscall.Stat_t).Blocks * 512; takes > size/8 {
			t.Errorf("with %d cuts, %d bytes take %d", cuts, size, takes)
		}
	}
}

// broken leaves a download cut off at cutAt.
func broken(t *testing.T, s *site) fixture {
	t.Helper()
	f := newFixture(t)
	s.cut, s.cuts = cutAt, 1
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := f.Resolve(ctx, source.Request{Ref: s.URL + "/disk.img", Progress: func(stage string, done, total int64) {
		if done == cutAt {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("error = %v, want context.Canceled", err)
	}
	got := files(t, f.Cache)
	if len(got) != 3 || got[0] != ".part" || got[1] != fmt.Sprintf("data %d", cutAt) || !strings.HasPrefix(got[2], "validator ") {
		t.Fatalf("cache after the interruption: %q", got)
	}
	entries, err := f.Store.List(t.Context())
	if err != nil || len(entries) != 0 {
		t.Fatalf("the store holds %+v (%v)", entries, err)
	}
	s.requests, s.cut = nil, 0
	return f
}

func TestResume(t *testing.T) {
	changed := bytes.ToUpper(append([]byte("changed "), content[8:]...))
	tests := []struct {
		name     string
		change   func(*site)
		want     []byte
		requests []string
	}{
		{"206", func(*site) {}, content, []string{`GET /disk.img bytes=1048576- "v1"`}},
		{"200, server knows no ranges", func(s *site) { s.noRanges = true }, content, []string{`GET /disk.img bytes=1048576- "v1"`}},
		{"200, another version", func(s *site) { s.body = changed; s.header.Set("ETag", `"v2"`) }, changed, []string{`GET /disk.img bytes=1048576- "v1"`}},
		{"shorter by now", func(s *site) { s.body = content[:cutAt]; s.header.Set("ETag", `"v2"`) }, content[:cutAt], []string{`GET /disk.img bytes=1048576- "v1"`}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSite(t)
			f := broken(t, s)
			tt.change(s)
			res, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"})
			f.wantBox(res, err, tt.want)
			s.wantRequests(t, tt.requests...)
		})
	}
}

// A server whose handling of ranges is broken never gets a wrong file past us.
func TestResumeFromBrokenServer(t *testing.T) {
	part := func(w http.ResponseWriter, etag, contentRange string, body []byte) {
		w.Header().Set("ETag", etag)
		w.Header().Set("Content-Range", contentRange)
		w.WriteHeader(http.StatusPartialContent)
		w.Write(body)
	}
	n := len(content)
	tests := []struct {
		name   string
		answer func(w http.ResponseWriter)
	}{
		{"another version in spite of If-Range", func(w http.ResponseWriter) {
			part(w, `"v2"`, fmt.Sprintf("bytes %d-%d/%d", cutAt, n-1, n), content[cutAt:])
		}},
		{"another size", func(w http.ResponseWriter) {
			part(w, `"v1"`, fmt.Sprintf("bytes %d-%d/%d", cutAt, n, n+1), append(content[cutAt:], 'x'))
		}},
		{"another part", func(w http.ResponseWriter) {
			part(w, `"v1"`, fmt.Sprintf("bytes 0-%d/%d", n-1, n), content)
		}},
		{"a part of no place", func(w http.ResponseWriter) { part(w, `"v1"`, "nonsense", content) }},
		{"no such range", func(w http.ResponseWriter) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", cutAt/2))
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSite(t)
			f := broken(t, s)
			s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Range") != "" {
					tt.answer(w)
					return
				}
				s.ServeHTTP(w, r)
			})
			res, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"})
			f.wantBox(res, err, content)
			s.wantRequests(t, "GET /disk.img")
		})
	}
}

// Without a validator there is nothing to resume by.
func TestNoResumeWithoutValidator(t *testing.T) {
	for _, etag := range []string{"", `W/"weak"`} {
		s, f := newSite(t), newFixture(t)
		s.header = http.Header{}
		if etag != "" {
			s.header.Set("ETag", etag)
		}
		s.cut, s.cuts = cutAt, 1
		res, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"})
		f.wantBox(res, err, content)
		s.wantRequests(t, "GET /disk.img", "GET /disk.img")
	}
	s, f := newSite(t), newFixture(t)
	s.header = http.Header{"Last-Modified": {"Mon, 06 May 2024 07:08:09 GMT"}, "Etag": {`W/"weak"`}}
	s.cut, s.cuts = cutAt, 1
	res, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"})
	f.wantBox(res, err, content)
	s.wantRequests(t, "GET /disk.img", "GET /disk.img bytes=1048576- Mon, 06 May 2024 07:08:09 GMT")
}

// A download that was complete, but not what the lock file pins, is not fetched
// again once the lock file allows it.
func TestWholeDownloadIsKeptForAnotherPin(t *testing.T) {
	s, f := newSite(t), newFixture(t)
	_, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img", Pin: digest.FromString("older")})
	if !errors.Is(err, boxes.ErrDigest) {
		t.Fatalf("error = %v, want ErrDigest", err)
	}
	res, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"})
	f.wantBox(res, err, content)
	s.wantRequests(t, "GET /disk.img", fmt.Sprintf(`GET /disk.img bytes=%d- "v1"`, len(content)))
}

// A server that always breaks off is given up, and one that never sends more
// than before is so too.
// A process that dies after its download became a box leaves two names of one file.
func TestDownloadAfterCrashSparesStore(t *testing.T) {
	s, f := newSite(t), newFixture(t)
	res, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"})
	f.wantBox(res, err, content)
	s.cut, s.cuts, s.noRanges = 1000, -1, true
	if _, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"}); err == nil {
		t.Fatal("a download that was cut off succeeded")
	}
	parts, err := filepath.Glob(filepath.Join(f.Cache, "*.part", "data"))
	if err != nil || len(parts) != 1 {
		t.Fatalf("partial downloads: %v, %v", parts, err)
	}
	if err := os.Remove(parts[0]); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(res.Box.Disk.Path, parts[0]); err != nil {
		t.Fatal(err)
	}
	s.cut = 0
	s.body = bytes.ToUpper(bytes.Repeat([]byte("other"), 1024))
	s.header.Set("Etag", `"v2"`)
	other, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"})
	f.wantBox(other, err, s.body)
	if err := f.Store.Verify(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

func TestGivingUp(t *testing.T) {
	s, f := newSite(t), newFixture(t)
	s.cut, s.cuts, s.noRanges = cutAt, -1, true
	_, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"})
	wantError(t, err, io.ErrUnexpectedEOF, fmt.Sprintf(`resolving box "%s/disk.img": downloading: unexpected EOF (after 3 attempts without progress)`, s.URL), "")
	s.wantRequests(t, "GET /disk.img", `GET /disk.img bytes=1048576- "v1"`, `GET /disk.img bytes=1048576- "v1"`, `GET /disk.img bytes=1048576- "v1"`)
}

func TestBadAnswers(t *testing.T) {
	secure := httptest.NewTLSServer(http.RedirectHandler("http://127.0.0.1:1/disk.img?token=secret", http.StatusFound))
	defer secure.Close()
	tests := []struct {
		name      string
		handler   http.HandlerFunc
		url       string
		want      string // behind "downloading: "
		hint      string
		requested int32
	}{
		{"404", http.NotFound, "", `the server answered "404 Not Found"`, "", 1},
		{"403", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(403) }, "", `the server answered "403 Forbidden"`, "the file may need a login, or be gone", 1},
		{"503", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(503) }, "", `the server answered "503 Service Unavailable" (after 3 attempts without progress)`, "", 3},
		{"part unasked", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(206) }, "", `the server answered "206 Partial Content"`, "", 1},
		{"redirect to a file", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "file:///etc/passwd")
			w.WriteHeader(302)
		}, "", `refusing a redirect to a "file" URL`, "", 1},
		{"redirect to itself", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "/disk.img?token=secret")
			w.WriteHeader(302)
		}, "", "giving up after 10 redirects", "", 10},
		{"redirect away from https", nil, secure.URL, "refusing a redirect from https to http, http://127.0.0.1:1/disk.img?…", "give a checksum, which protects the content on any way", 0},
		{"huge Content-Length", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000000000000000")
			w.(http.Flusher).Flush()
		}, "", "the file is larger than the limit of 8388608 bytes", "", 1},
		{"endless body", func(w http.ResponseWriter, r *http.Request) { io.Copy(w, zeros{}) }, "", "the file is larger than the limit of 8388608 bytes", "", 1},
		{"silence", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "", "the server sent nothing for 300ms", "", 1},
		{"silence after a while", func(w http.ResponseWriter, r *http.Request) {
			w.Write(content[:100])
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, "", "the server sent nothing for 300ms (after 3 attempts without progress)", "", 4},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			f.MaxBytes, f.Transport = 8<<20, secure.Client().Transport
			if strings.HasPrefix(tt.name, "silence") {
				f.Stall = 300 * time.Millisecond
			}
			var requested atomic.Int32
			if tt.url == "" {
				s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					requested.Add(1)
					tt.handler(w, r)
				}))
				defer s.Close()
				tt.url = s.URL
			}
			_, err := f.Resolve(t.Context(), source.Request{Ref: tt.url + "/disk.img?token=secret"})
			wantError(t, err, nil, fmt.Sprintf(`resolving box "%s/disk.img?…": downloading: %s`, tt.url, tt.want), tt.hint)
			if got := requested.Load(); got != tt.requested {
				t.Errorf("%d requests, want %d", got, tt.requested)
			}
			if tt.name != "silence after a while" {
				f.wantNothingKept()
			}
		})
	}
}

// With a checksum, the way may be an unprotected one.
func TestRedirectAwayFromHTTPSWithChecksum(t *testing.T) {
	s, f := newSite(t), newFixture(t)
	secure := httptest.NewTLSServer(http.RedirectHandler(s.URL+"/disk.img", http.StatusFound))
	defer secure.Close()
	f.Transport = secure.Client().Transport
	res, err := f.Resolve(t.Context(), source.Request{Ref: secure.URL, Checksum: digest.FromBytes(content).String()})
	f.wantBox(res, err, content)
}

// A slow server is not a silent one: the whole may take longer than any wait.
func TestSlowBody(t *testing.T) {
	f := newFixture(t)
	f.Stall = time.Second
	const pieces = 30
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for i := range pieces {
			w.Write(content[i*1024 : (i+1)*1024])
			w.(http.Flusher).Flush()
			time.Sleep(50 * time.Millisecond)
		}
	}))
	defer s.Close()
	start := time.Now()
	res, err := f.Resolve(t.Context(), source.Request{Ref: s.URL})
	f.wantBox(res, err, content[:pieces*1024])
	if took := time.Since(start); took < f.Stall {
		t.Errorf("the download took %v, too short to show anything", took)
	}
}

// A connection that cannot be made fails at once and shows no secret.
func TestNoServer(t *testing.T) {
	s := httptest.NewServer(nil)
	host := strings.TrimPrefix(s.URL, "http://")
	s.Close()
	f := newFixture(t)
	f.SetBackoff(time.Hour)
	_, err := f.Resolve(t.Context(), source.Request{Ref: "http://user:secret@" + host + "/disk.img?token=secret"})
	wantError(t, err, nil, fmt.Sprintf(`resolving box "http://%s/disk.img?…": downloading: dial tcp %s: connect: connection refused`, host, host), "")
	f.wantNothingKept()
}

// What was downloaded and is no disk is not kept.
func TestDownloadUnsafe(t *testing.T) {
	s, f := newSite(t), newFixture(t)
	s.body = append([]byte("<!DOCTYPE html><html>"), content...)
	_, err := f.Resolve(t.Context(), source.Request{Ref: s.URL + "/disk.img"})
	if !errors.Is(err, boxes.ErrUnsafe) {
		t.Errorf("error = %v, want ErrUnsafe", err)
	}
	f.wantNothingKept()
}

// Two who want the same download it once, if a checksum tells that it is the
// same.
func TestDownloadTogether(t *testing.T) {
	s, f := newSite(t), newFixture(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			_, err := f.Resolve(context.Background(), source.Request{Ref: s.URL + "/disk.img", Checksum: digest.FromBytes(content).String()})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	s.wantRequests(t, "GET /disk.img")
	f.wantCache()
}

// Whoever waits for another's download can be interrupted.
func TestWaitForDownloadInterrupted(t *testing.T) {
	f := newFixture(t)
	started := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(started)
		<-r.Context().Done()
	}))
	defer s.Close()
	first, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.Resolve(first, source.Request{Ref: s.URL})
	}()
	<-started
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := f.Resolve(ctx, source.Request{Ref: s.URL})
	wantError(t, err, context.DeadlineExceeded, fmt.Sprintf("resolving box %q: preparing the download: waiting for another process that downloads the same: context deadline exceeded", s.URL), "")
	stop()
	<-done
	f.wantNothingKept()
}

// No error of a download shows what must not be shown.
func TestErrorsKeepSecrets(t *testing.T) {
	for _, ref := range []string{
		"http://user:hunter2@127.0.0.1:1/disk.img?token=hunter2",
		"http://user:hunter2@127.0.0.1:99999/disk.img?token=hunter2",
		"http://user:hunter2@host name/disk.img",
		"ftp://user:hunter2@host/disk.img",
		"https://user:hunter2@/disk.img",
		"https://user:hunter2@%zz/disk.img",
	} {
		f := newFixture(t)
		_, err := f.Resolve(t.Context(), source.Request{Ref: ref})
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("Resolve: error = %v", err)
		}
		_, err = f.Resolve(t.Context(), source.Request{Ref: filepath.Join(t.TempDir(), "x.img"), Checksum: "file:" + ref})
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("Resolve with checksums: error = %v", err)
		}
		if u, err := url.Parse(ref); err == nil && strings.Contains(source.Redact(u.String()), "hunter2") {
			t.Errorf("Redact(%q) shows it", u)
		}
	}
}
