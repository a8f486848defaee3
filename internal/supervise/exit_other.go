// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package supervise

import "context"

// exitOf returns a function that waits for the end of a process: not here.
func exitOf(int) func(context.Context) error {
	return func(context.Context) error { return nil }
}
