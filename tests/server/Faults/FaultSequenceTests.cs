using System.Diagnostics;
using System.Globalization;
using System.Text.RegularExpressions;

namespace Rollout.Server.Tests;

/// <summary>
/// Random sequences of faults against one server, which must survive all of them. ROLLOUT_FAULT_SEQUENCES says how many, instead of 200;
/// ROLLOUT_FAULT_SEED repeats a campaign that failed.
/// </summary>
public sealed partial class FaultSequenceTests
{
    /// <summary>
    /// After a quarter of the sequences the server's memory may grow by this much, for any length of the campaign. The heap of .NET
    /// settles at about 130 MB after 600 sequences and stays there (3,000: 128 MB to 132);
    /// a campaign of 10,000 sends gigabytes, of which less than a hundredth may stay.
    /// </summary>
    private const double MostGrowthMegabytes = 40;

    [Fact]
    public async Task Any_sequence_of_faults_leaves_old_weights_or_new_or_none_and_nothing_else()
    {
        int sequences = Setting("ROLLOUT_FAULT_SEQUENCES") ?? 200;
        int seed = Setting("ROLLOUT_FAULT_SEED") ?? Random.Shared.Next(1 << 20);
        string[] before = Footprint.SharedMemory("*");
        Variants variants = await Variants.SharedAsync();
        await using ServerProcess server = await ServerProcess.StartAsync(
            variants.Folder(default), "--kv-cache", "4MiB", "--max-context", "256");
        Footprint? warm = null;
        HashSet<string> committed;
        long started = Stopwatch.GetTimestamp();
        using (FaultCampaign campaign = new(server, variants))
        {
            for (int i = 0; i < sequences; i++)
            {
                try
                {
                    await campaign.RunAsync(unchecked((seed * 1_000_003) + i));
                }
                catch (Exception e)
                {
                    throw new InvalidOperationException(
                        $"sequence {i} of ROLLOUT_FAULT_SEED={seed}: {e.Message}\nthe server's log ends:\n{End(server.Log)}", e);
                }

                if (i == sequences / 4) warm = Footprint.Of(server.Id);
                if (i % Math.Max(1, sequences / 10) == 0) Say($"{Footprint.Of(server.Id).ResidentMegabytes:F1} MB");
            }

            committed = campaign.Committed;
            Say($"{sequences} sequences in {Stopwatch.GetElapsedTime(started).TotalSeconds:F1} s");
            foreach ((string end, int count) in campaign.Ends) Say($"{count,6} {end}");
        }

        Footprint after = Footprint.Of(server.Id);
        Say($"{warm!.ResidentMegabytes:F1} MB after the warm-up, {after.ResidentMegabytes:F1} MB at the end");
        Assert.Equal(warm.Threads, after.Threads);
        Assert.Equal(warm.Files, after.Files);
        Assert.InRange(after.ResidentMegabytes - warm.ResidentMegabytes, -1000, MostGrowthMegabytes);
        Assert.Empty(Footprint.SharedMemory("rollout-faults-*").Except(before));

        // An update that committed is not logged as failed too.
        server.Signal("TERM");
        Assert.Equal(0, await server.ExitAsync());
        Assert.DoesNotContain(NotCommitted().Matches(server.Log), failure => committed.Contains(failure.Groups[1].Value));
    }

    [GeneratedRegex("Update by '(push-[0-9]+)' (?:aborted|failed|rejected)")]
    private static partial Regex NotCommitted();

    private static int? Setting(string name)
        => Environment.GetEnvironmentVariable(name) is { Length: > 0 } value ? int.Parse(value, CultureInfo.InvariantCulture) : null;

    private static void Say(string line) => TestContext.Current.TestOutputHelper!.WriteLine(line);

    private static string End(string log) => log[Math.Max(0, log.Length - 3000)..];
}
