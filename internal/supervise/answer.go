// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"errors"
	"fmt"

	"github.com/labfile/lab/internal/guest"
)

// answers returns once a machine has answered: see Client.Answer.
func (s *supervisor) answers(ctx context.Context, q request) error {
	m, err := s.asked(ctx, q)
	if err != nil {
		return err
	}
	m.mu.Lock()
	agent, port := m.agent, m.port
	m.mu.Unlock()
	switch {
	case agent != LinkNone:
		conn, err := m.openAgent(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = guest.SayHello(ctx, conn)
		var refused *guest.RefusedError
		if errors.As(err, &refused) { // that is an answer
			return nil
		}
		return err
	case port != nil:
		return port.Ask(ctx)
	}
	return fmt.Errorf("asking %s: %w", m.spec.Generation, ErrNoAgent)
}
