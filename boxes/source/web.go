// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/hashicorp/go-getter/v2"
	"github.com/opencontainers/go-digest"

	"github.com/labfile/lab/boxes"
)

// web downloads a disk and adds it to the store. What was downloaded of it
// survives an interruption and is completed the next time.
func (r *Resolver) web(ctx context.Context, ref reference, req Request) (Result, error) {
	sum, err := r.checksum(ctx, req, ref.url.Path)
	if err != nil {
		return Result{}, err
	}
	if box, ok := r.known(ctx, req, sum); ok {
		return Result{Box: box, Checksum: sum.String()}, nil
	}
	if req.Offline {
		return Result{}, withHint("run once without --offline", "%w: the box has not been downloaded yet", ErrOffline)
	}
	part, err := openPartial(ctx, r.Cache, ref.url)
	if err != nil {
		return Result{}, fmt.Errorf("preparing the download: %w", err)
	}
	defer part.close()
	// Whoever held the partial download before may have completed it.
	if box, ok := r.known(ctx, req, sum); ok {
		return Result{Box: box, Checksum: sum.String()}, nil
	}
	if err := r.download(ctx, ref.url, part, sum != "", req.Progress); err != nil {
		return Result{}, fmt.Errorf("downloading: %w", err)
	}
	box, err := r.ingest(ctx, req, boxes.Ingredients{Disk: part.data(), Move: true, Checksum: sum, Origin: redact(ref.url)})
	if err != nil {
		// Of a file that is wrong, nothing can be completed. One that is only
		// another than the lock file says can be used once the lock allows it.
		var wrong *boxes.DigestError
		if errors.Is(err, boxes.ErrUnsafe) || (errors.As(err, &wrong) && wrong.What == "checksum") {
			part.remove()
		}
		return Result{}, err
	}
	part.remove()
	if sum == "" {
		sum = sourceOf(box)
	}
	return Result{Box: box, Checksum: sum.String(), Fetched: true}, nil
}

// known finds a box in the store that is what downloading a file with the
// checksum would make: a box of that disk alone, of the same description.
func (r *Resolver) known(ctx context.Context, req Request, sum digest.Digest) (boxes.Box, bool) {
	if sum == "" || sum.Algorithm() != digest.SHA256 {
		return boxes.Box{}, false
	}
	entries, err := r.Store.List(ctx)
	if err != nil {
		return boxes.Box{}, false
	}
	for _, e := range entries {
		c, want := e.Config, req.config()
		if c.Vagrant {
			want = asVagrant(want)
		}
		if e.Damage == nil && sourceOf(e.Box) == sum && e.Kernel == (boxes.File{}) && e.Initrd == (boxes.File{}) &&
			(req.Pin == "" || req.Pin == e.Digest) &&
			c.Architecture == want.Architecture && c.User == want.User && c.CloudInit == want.CloudInit &&
			c.Agent == want.Agent && c.MinMemory == want.MinMemory && c.Append == want.Append &&
			c.Created.Equal(want.Created) && len(c.Packages) == 0 && len(want.Packages) == 0 {
			return e.Box, true
		}
	}
	return boxes.Box{}, false
}

// download completes part. It goes through go-getter's client, with one getter,
// ours, and without its detectors and decompressors. The client would obey
// "?archive=", "?checksum=" and "//subdir" of the address, so it never sees it:
// the getter knows it already.
func (r *Resolver) download(ctx context.Context, u *url.URL, part *partial, checked bool, p Progress) error {
	client := r.client(checked)
	defer client.CloseIdleConnections()
	g := &httpGetter{resolver: r, client: client, url: u, part: part, progress: p}
	c := getter.Client{
		Getters:         []getter.Getter{g},
		Decompressors:   map[string]getter.Decompressor{},
		DisableSymlinks: true,
	}
	_, err := c.Get(ctx, &getter.Request{Src: "https://box.invalid/", Dst: part.data(), GetMode: getter.ModeFile})
	return err
}

// client returns an HTTP client that follows redirects to http and https only,
// and away from https only if a checksum protects the content.
func (r *Resolver) client(checked bool) *http.Client {
	transport := r.Transport
	if transport == nil {
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.DisableCompression = true
		proxy := r.proxy
		if proxy == nil {
			proxy = http.ProxyFromEnvironment
		}
		t.Proxy = quietly(proxy)
		transport = t
	}
	return &http.Client{Transport: transport, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		// It would tell the next host the query of this one.
		req.Header.Del("Referer")
		switch {
		case req.URL.Scheme != "http" && req.URL.Scheme != "https":
			return fmt.Errorf("refusing a redirect to a %q URL", req.URL.Scheme)
		case req.URL.Scheme == "http" && via[0].URL.Scheme == "https" && !checked:
			return withHint("give a checksum, which protects the content on any way", "refusing a redirect from https to http, %s", redact(req.URL))
		case len(via) >= 10:
			return errors.New("giving up after 10 redirects")
		}
		return nil
	}}
}

// quietly keeps what is in the environment, maybe a password, out of an error of proxy.
func quietly(proxy func(*http.Request) (*url.URL, error)) func(*http.Request) (*url.URL, error) {
	return func(r *http.Request) (*url.URL, error) {
		u, err := proxy(r)
		if err != nil {
			err = withHint("correct or unset http_proxy and https_proxy, in capitals, too", "the proxy that the environment names is not a URL")
		}
		return u, err
	}
}

// fetchSmall downloads at most limit bytes into memory.
func (r *Resolver) fetchSmall(ctx context.Context, u *url.URL, limit int64) ([]byte, error) {
	client := r.client(false)
	defer client.CloseIdleConnections()
	ctx, watch := r.watch(ctx)
	defer watch.stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, errors.New("the URL is malformed")
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, watch.explain(withoutURL(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, statusError(resp)
	}
	data, err := readSmall(watch.reader(resp.Body), limit)
	return data, watch.explain(err)
}
