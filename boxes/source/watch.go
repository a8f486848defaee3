// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// watch ends a transfer that brings nothing any more. It bounds each wait, not
// the whole: a slow server is no reason to give up.
type watch struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
	limit  time.Duration
}

var errStalled = errors.New("stalled")

// watch returns a context that ends once nothing has come for a while.
func (r *Resolver) watch(ctx context.Context) (context.Context, *watch) {
	w := &watch{limit: r.Stall}
	if w.limit == 0 {
		w.limit = DefaultStall
	}
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	w.timer = time.AfterFunc(w.limit, func() { w.cancel(errStalled) })
	return w.ctx, w
}

func (w *watch) stop() {
	w.timer.Stop()
	w.cancel(nil)
}

// explain says in place of "context canceled" that the server fell silent.
func (w *watch) explain(err error) error {
	if err != nil && context.Cause(w.ctx) == errStalled {
		return &retryable{fmt.Errorf("the server sent nothing for %v", w.limit)}
	}
	return err
}

// reader passes r on and notes that something came.
func (w *watch) reader(r io.Reader) io.Reader { return watched{w, r} }

type watched struct {
	w *watch
	r io.Reader
}

func (w watched) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if n > 0 {
		w.w.timer.Reset(w.w.limit)
	}
	return n, err
}
