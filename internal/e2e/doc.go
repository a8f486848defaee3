// SPDX-License-Identifier: Apache-2.0

// Package e2e tests lab from outside: it drives the built binary as its users
// do, with real boxes and real machines, as root and as an ordinary user.
//
// The tests stand behind the build tag e2e; "make e2e" runs them. They need
// QEMU and what builds boxes ("make deps").
package e2e
