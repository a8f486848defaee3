// SPDX-License-Identifier: Apache-2.0

package memory

import (
	"context"
	"errors"
)

// What Echo prints when it has booted, and the keys that it obeys.
const (
	Banner   = "lab test disk"
	KeyOff   = 'q'
	KeyPanic = 'p'
	KeyReset = 'r'
	KeyWrite = 'w'
)

// ErrPanic is the panic of Echo.
var ErrPanic = errors.New("panic was typed at the console")

// Echo is a guest that prints Banner, powers off, panics, resets itself or writes
// a sector to its disk when one of the keys is typed, echoes any other and the
// last, and obeys the power button.
func Echo(ctx context.Context, g *Guest) error { return echo(ctx, g, g.PowerButton()) }

// Deaf is Echo, but ignores the power button.
func Deaf(ctx context.Context, g *Guest) error { return echo(ctx, g, nil) }

func echo(ctx context.Context, g *Guest, button <-chan struct{}) error {
	keys := make(chan byte)
	go func() {
		defer close(keys)
		b := make([]byte, 1)
		for {
			if _, err := g.Read(b); err != nil {
				return
			}
			select {
			case keys <- b[0]:
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		g.Write([]byte(Banner + "\r\n"))
		for reset := false; !reset; {
			select {
			case <-ctx.Done():
				return nil
			case <-button:
				return nil
			case k, ok := <-keys:
				switch {
				case !ok:
					return nil
				case k == KeyOff:
					return nil
				case k == KeyPanic:
					return ErrPanic
				case k == KeyReset:
					reset = true
				default:
					if k == KeyWrite {
						g.WriteDisk(512)
					}
					g.Write([]byte{k})
				}
			}
		}
	}
}
