using CsCheck;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>The scheduler and the KV blocks under random load of every kind: see <see cref="RandomLoad"/>.</summary>
public sealed class SchedulerTests
{
    private static readonly Gen<LoadPlanned> s_load =
        from seats in Gen.Int[1, 12]
        from batchTokens in Gen.Int[1, 80]
        from blocks in Gen.Int[8, 60] // a sample has at most 8 blocks: one always fits, many together never do
        from plansAhead in Gen.Bool
        from script in Gen.Int[0, int.MaxValue - 1].Array[10, 120]
        select new LoadPlanned(seats, batchTokens, blocks, plansAhead, script);

    [Fact]
    public void Under_any_load_every_row_finds_its_past_and_every_sample_ends_as_it_should()
        => s_load.Sample(load => new RandomLoad(load).Run(), iter: 200, threads: 1);
}
