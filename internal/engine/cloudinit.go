// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/ledger"
)

// cloudInitTime bounds what a guest that no longer answers costs: one that does gives up
// earlier by itself.
const cloudInitTime = 11 * time.Minute

// awaitCloudInit waits until cloud-init has carried out the seed of a newborn. It lets
// people in long before: what it does then would count as drift.
func (s *session) awaitCloudInit(ctx context.Context, target guest.Target, l launch, c ledger.Create) {
	if c.Agent && l.m.UserData == "" {
		return // there is no seed
	}
	limit, cancel := context.WithTimeout(ctx, cmp.Or(s.host.Patience, loginTime))
	defer cancel()
	client, err := guest.Connect(limit, target)
	if err != nil {
		s.host.Log.Debug("asking after cloud-init", "machine", l.Generation, "err", err)
		return
	}
	defer client.Close()
	s.emit(Event{Machine: l.Machine, Generation: l.Number, Stage: StageBirth, Text: "waiting for cloud-init to end"})
	whole, cancel := context.WithTimeout(ctx, cloudInitTime)
	defer cancel()
	if err := client.Run(whole, guest.Command{Args: []string{"sh", "-c", guest.CloudInitEnds}}); err != nil {
		s.host.Log.Debug("waiting for cloud-init", "machine", l.Generation, "err", err)
	}
}
