// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
)

// adoptEvery is how often a machine that does not answer yet is tried.
const adoptEvery = time.Second

// adopt gives a machine of a Vagrant box its identity, over ssh: it has neither an agent
// nor, as a rule, cloud-init. One that has it already is left alone.
func (s *session) adopt(ctx context.Context, target guest.Target, g lab.Generation, c ledger.Create) error {
	ctx, cancel := context.WithTimeoutCause(ctx, bootTimeout, fmt.Errorf("nobody let lab in within %s", bootTimeout))
	defer cancel()
	identity, err := s.identity(g, c)
	if err != nil {
		return err
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageIdentity, Text: "waiting for the guest"})
	var refused time.Time // since when nobody is let in
	for {
		client, err := guest.Connect(ctx, target)
		if err == nil {
			return client.Close()
		}
		// It answers, and is somebody else yet: it speaks with a key of its own, or lets
		// the lab's key not in because an earlier attempt was cut off half-way.
		err = guest.Adopt(ctx, target, guest.AdoptConfig{Identity: identity, User: user(c)})
		if err == nil {
			continue
		}
		switch {
		case !errors.Is(err, guest.ErrLogin):
			refused = time.Time{}
		case refused.IsZero():
			refused = time.Now()
		case time.Since(refused) > cmp.Or(s.host.Patience, loginTime): // a guest that is booting lets nobody in either
			return fmt.Errorf("giving the guest its identity: %w; does the box let in user %q? (user: in the Labfile)", err, user(c))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("giving the guest its identity: %w (%w)", context.Cause(ctx), err)
		case <-time.After(adoptEvery):
		}
	}
}
