// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"time"

	"github.com/hashicorp/go-getter/v2"
	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/fsutil"
)

// httpGetter downloads one file. It stands in for go-getter's own HTTP getter,
// whose read timeout covers the whole body, which resumes without If-Range and
// appends a whole reply to a part, and whose size limit a progress listener
// lifts.
type httpGetter struct {
	resolver *Resolver
	client   *http.Client
	url      *url.URL
	part     *partial
	progress Progress

	answered bool // the server has answered at least once
}

var _ getter.Getter = (*httpGetter)(nil)

// Detect takes every request: the only one that comes is ours.
func (g *httpGetter) Detect(*getter.Request) (bool, error) { return true, nil }

// Mode is that of a file, always.
func (g *httpGetter) Mode(context.Context, *url.URL) (getter.Mode, error) {
	return getter.ModeFile, nil
}

// Get would download a directory.
func (g *httpGetter) Get(context.Context, *getter.Request) error {
	return errors.New("directories cannot be downloaded")
}

// maxIdle is how often in a row an attempt may bring nothing.
const maxIdle = 3

// GetFile completes the partial download, with as many attempts as bring it
// forward.
func (g *httpGetter) GetFile(ctx context.Context, _ *getter.Request) error {
	backoff := g.resolver.backoff
	if backoff == 0 {
		backoff = time.Second
	}
	var most int64
	for idle := 0; ; {
		n, err := g.attempt(ctx)
		var again *retryable
		if err == nil || ctx.Err() != nil || !errors.As(err, &again) || !g.answered {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return err
		}
		if idle++; n > most {
			idle, most = 0, n
		}
		if idle >= maxIdle {
			return fmt.Errorf("%w (after %d attempts without progress)", err, idle)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(backoff << idle):
		}
	}
}

// retryable marks an error that another attempt may not meet.
type retryable struct{ error }

func (r *retryable) Unwrap() error { return r.error }

// attempt sends one request and returns how many bytes of the file are there
// after it, as far as it knows.
func (g *httpGetter) attempt(ctx context.Context) (int64, error) {
	f, have, v, err := g.part.open()
	if err != nil {
		return 0, err
	}
	defer f.Close()
	ctx, watch := g.resolver.watch(ctx)
	defer watch.stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.url.String(), nil)
	if err != nil {
		return 0, errors.New("the URL is malformed")
	}
	req.Header.Set("User-Agent", "lab")
	req.Header.Set("Accept-Encoding", "identity")
	if have > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", have))
		req.Header.Set("If-Range", v.ifRange())
	}
	resp, err := g.client.Do(req)
	if err != nil {
		return 0, &retryable{watch.explain(withoutURL(err))}
	}
	defer resp.Body.Close()
	g.answered = true

	total := resp.ContentLength
	switch {
	case resp.StatusCode == http.StatusOK:
		have = 0
		if err := g.part.restart(f, validatorOf(resp.Header, total)); err != nil {
			return 0, err
		}
	case resp.StatusCode == http.StatusPartialContent && have > 0:
		start, t := contentRange(resp.Header)
		if start != have || v.contradicts(validatorOf(resp.Header, t)) {
			return 0, g.restart(f, "the server sent a part that doesn't fit what is there")
		}
		if total = t; total < 0 {
			total = v.Total
		}
		if _, err := f.Seek(have, io.SeekStart); err != nil {
			return 0, err
		}
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable && have > 0:
		// The server has no more: what is there is whole, or wrong.
		if _, t := contentRange(resp.Header); t == have && !v.contradicts(validatorOf(resp.Header, t)) {
			return have, nil
		}
		return 0, g.restart(f, "the server has less than what is there")
	default:
		return 0, statusError(resp)
	}
	if err := g.checkRoom(have, total); err != nil {
		return 0, err
	}
	n, err := g.receive(f, watch.reader(resp.Body), have, total)
	if err == nil && total >= 0 && have+n != total {
		err = &retryable{io.ErrUnexpectedEOF}
	}
	if err != nil {
		return have + n, watch.explain(err)
	}
	return have + n, f.Close()
}

// restart throws the part away and asks for another attempt.
func (g *httpGetter) restart(f *os.File, why string) error {
	if err := g.part.restart(f, validator{Total: -1}); err != nil {
		return err
	}
	return &retryable{errors.New(why)}
}

func (g *httpGetter) limit() int64 {
	if g.resolver.MaxBytes > 0 {
		return g.resolver.MaxBytes
	}
	return DefaultMaxBytes
}

func (g *httpGetter) tooLarge() error {
	g.part.remove()
	return fmt.Errorf("the file is larger than the limit of %d bytes", g.limit())
}

// checkRoom refuses early what would fill the disk.
func (g *httpGetter) checkRoom(have, total int64) error {
	if total > g.limit() {
		return g.tooLarge()
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(g.part.dir, &fs); err != nil {
		return nil // then the disk is full when it is full
	}
	if room := int64(fs.Bavail) * int64(fs.Bsize); total-have > room {
		return withHint("free some space, or set XDG_CACHE_HOME to a roomier place",
			"the file needs %d more bytes, and %s has room for %d: %w", total-have, g.part.dir, room, unix.ENOSPC)
	}
	return nil
}

// receive appends body to f and reports progress. It returns how many bytes it
// wrote; an error of body's is retryable, one of f's is not.
func (g *httpGetter) receive(f *os.File, body io.Reader, have, total int64) (n int64, err error) {
	const step = 1 << 20
	buf := make([]byte, 128<<10)
	known := max(total, 0)
	// Until it is closed the file may be shorter than the data received: then the next attempt asks
	// for zeros again.
	to := fsutil.AppendSparse(f, have)
	defer func() {
		if cerr := to.Close(); err == nil {
			err = cerr
		}
	}()
	g.progress("downloading", have, known)
	for told := int64(0); ; {
		m, err := body.Read(buf)
		if have+n+int64(m) > g.limit() {
			return n, g.tooLarge()
		}
		if m > 0 {
			if _, err := to.Write(buf[:m]); err != nil {
				return n, err
			}
			n += int64(m)
		}
		if n-told >= step || err != nil {
			told = n
			g.progress("downloading", have+n, known)
		}
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, &retryable{err}
		}
	}
}

var rangeSyntax = regexp.MustCompile(`^bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)$`)

// contentRange reads a Content-Range header: where the part starts, and how
// large the whole is; -1 for what it doesn't say.
func contentRange(h http.Header) (start, total int64) {
	start, total = -1, -1
	m := rangeSyntax.FindStringSubmatch(h.Get("Content-Range"))
	if m == nil {
		return start, total
	}
	if n, err := strconv.ParseInt(m[1], 10, 64); err == nil {
		start = n
	}
	if n, err := strconv.ParseInt(m[2], 10, 64); err == nil {
		total = n
	}
	return start, total
}

// statusError explains a reply that is not the file.
func statusError(resp *http.Response) error {
	err := fmt.Errorf("the server answered %q", resp.Status)
	switch {
	case resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden:
		return hinted{err, "the file may need a login, or be gone"}
	case resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusRequestTimeout || resp.StatusCode >= 500:
		return &retryable{err}
	}
	return err
}

// withoutURL takes the URL out of an error of http.Client: it may hold a token.
func withoutURL(err error) error {
	var e *url.Error
	if errors.As(err, &e) {
		return e.Err
	}
	return err
}
