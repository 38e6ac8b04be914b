using System.Globalization;
using Grpc.Core;
using Rollout.Client;
using Rollout.V1;
using Xunit.Sdk;
using EngineState = Rollout.V1.EngineState;

namespace Rollout.Server.Tests;

/// <summary>
/// Faults of a trainer in an update, each from a real separate process: killed at any step, stalled, changed or missing bytes, two at once,
/// no room. Afterwards the old weights are served, or the new ones, or none and the server reports it; and the next trainer's push is
/// served.
/// </summary>
public sealed class TrainerFaultTests(FaultServer server) : IClassFixture<FaultServer>
{
    private const int Messages = 9;

    private readonly string _old = server.Variants.Folder(FaultServer.Old);
    private readonly string _new = server.Variants.Folder(FaultServer.New);

    /// <summary>Every step that changes something, and a random chunk.</summary>
    public static IEnumerable<TheoryDataRow<string, string, string>> Deaths() =>
        from route in (string[])["inline", "shm", "file"]
        from mode in (string[])["staged", "inplace"]
        from step in (string[])["opened", "begun", "sent", "committing", "committed"]
        where route == "inline" || step is "sent" or "committing"
        select new TheoryDataRow<string, string, string>(route, mode, step);

    [Theory, MemberData(nameof(Deaths))]
    public async Task A_trainer_is_killed(string route, string mode, string step)
    {
        ulong version = await server.HealAsync();
        int sent = route == "file" ? 0 : Random.Shared.Next(Messages);
        await using (TrainerProcess trainer = TrainerProcess.Start(server.Process, "push", _new, route, mode, Messages))
        {
            await trainer.ToAsync(step == "sent" ? $"sent {sent.ToString(CultureInfo.InvariantCulture)}" : step);
            await trainer.KillAsync();
        }

        StatusReply status = await server.SettledAsync();
        bool broken = status.State == EngineState.Poisoned;
        bool inPlace = mode == "inplace";
        switch (step)
        {
            case "sent" when inPlace && (broken || route != "inline"):
            case "committing" when inPlace && status.Version == version:
                await server.IsPoisonedAsync(version);
                break;
            case "committing" when status.Version == version + 1:
            case "committed":
                await server.ServesAsync(FaultServer.New, version + 1);
                break;
            default: // chunks in transit may not have been processed, not even the first
                await server.ServesAsync(FaultServer.Old, version);
                break;
        }

        await server.LeavesNothingAsync();
    }

    [Theory, InlineData("staged"), InlineData("inplace")]
    public async Task A_trainer_that_uses_the_library_is_killed_while_it_copies_a_tensor(string mode)
    {
        ulong version = await server.HealAsync();
        await using (TrainerProcess trainer = TrainerProcess.Start(server.Process, "publish", _new, "shm", mode, 60))
        {
            await trainer.ToAsync("copy 20"); // windows before it have been read
            await trainer.KillAsync();
            Assert.Empty(Footprint.SharedMemory($"rollout-{trainer.Id}-*")); // it wrote into the server's own memory
        }

        if (mode == "inplace") await server.IsPoisonedAsync(version);
        else await server.ServesAsync(FaultServer.Old, version);
        await server.LeavesNothingAsync();
    }

    [Theory, InlineData("staged"), InlineData("inplace")]
    public async Task A_stalled_trainer_loses_its_seat_at_its_deadline_and_learns_why(string mode)
    {
        ulong version = await server.HealAsync();
        await using TrainerProcess trainer = TrainerProcess.Start(server.Process, "publish", _new, "shm", mode, 2);
        await trainer.ToAsync("copy 20");
        if (mode == "inplace") await server.IsPoisonedAsync(version); // waits until the update has ended
        else await server.ServesAsync(FaultServer.Old, version);
        await trainer.GoOnAsync();
        string end = await trainer.EndAsync();
        Assert.StartsWith("failed WeightUpdateFailedException", end, StringComparison.Ordinal);
        Assert.Contains(mode == "inplace" ? "poisoned" : nameof(UpdateOutcome.NotCommitted), end, StringComparison.Ordinal);
        await server.LeavesNothingAsync();
    }

    [Fact]
    public async Task Of_two_trainers_at_once_the_second_is_told_who_the_first_is()
    {
        ulong version = await server.HealAsync();
        await using TrainerProcess first = TrainerProcess.Start(server.Process, "push", _new, "inline", "staged", Messages);
        await first.ToAsync("sent 3");
        await using TrainerProcess second = TrainerProcess.Start(server.Process, "publish", _old, "shm", "inplace", 20);
        string refused = await second.EndAsync();
        Assert.Matches("FailedPrecondition.*'trainer' is updating", refused);
        await server.Process.SamplesAsync(Variants.Probe());
        await first.GoOnAsync();
        Assert.Equal($"committed {version + 1}", await first.EndAsync());
        await server.ServesAsync(FaultServer.New, version + 1);

        // And one after the other: the base version is compared.
        await using (RolloutClient client = RolloutClient.Connect(server.Process.Address))
        await using (WeightPublisher late = new(client))
        {
            WeightUpdateRejectedException rejected = await Assert.ThrowsAsync<WeightUpdateRejectedException>(
                () => late.PushAsync(server.Variants.Sources(FaultServer.Old), options: new PushOptions { BaseVersion = version }));
            Assert.Contains("base_version", rejected.Message, StringComparison.Ordinal);
        }

        await server.ServesAsync(FaultServer.New, version + 1);
        await server.LeavesNothingAsync();
    }

    /// <summary>A flipped bit, chunks in the wrong order, a segment that is shorter than it was, also while it is being read.</summary>
    public static IEnumerable<TheoryDataRow<string, bool, bool>> Damages() =>
        from damage in (string[])["flipped bit", "reordered", "truncated", "truncated while read"]
        from sharedMemory in (bool[])[false, true]
        from inPlace in (bool[])[false, true]
        where sharedMemory || !damage.StartsWith("truncated", StringComparison.Ordinal)
        select new TheoryDataRow<string, bool, bool>(damage, sharedMemory, inPlace);

    [Theory, MemberData(nameof(Damages))]
    public async Task Damaged_bytes_are_never_served(string damage, bool sharedMemory, bool inPlace)
    {
        ulong version = await server.HealAsync();
        Sending sending = server.Variants.Send(Scope.Full, FaultServer.New);
        byte[] payload = sending.Bytes;
        if (damage == "flipped bit") payload[Random.Shared.Next(payload.Length)] ^= (byte)(1 << Random.Shared.Next(8));
        using TemporaryFolder shm = new("/dev/shm/rollout-test-");
        await File.WriteAllBytesAsync(shm["segment"], payload);
        UpdateRequest Message(int from, int to) => sharedMemory
            ? Transaction.Window(shm["segment"], from, to)
            : Transaction.Chunk(payload, from, to);

        UpdateReply end;
        using (Transaction update = new(server.Process.Weights))
        {
            BeginUpdate begin = sending.Begin(version, version + 1);
            begin.Mode = inPlace ? V1.UpdateMode.InPlace : V1.UpdateMode.Staged;
            Assert.Null(await update.BeginAsync(begin));
            int third = payload.Length / 3;
            await update.SendAsync(Message(0, third));
            if (sharedMemory) await update.LandedAsync((ulong)third);
            using FileStream segment = new(shm["segment"], FileMode.Open, FileAccess.Write, FileShare.ReadWrite);
            switch (damage)
            {
                case "reordered":
                    await update.SendAsync(Message(2 * third, payload.Length));
                    await update.SendAsync(Message(third, 2 * third));
                    break;
                case "truncated":
                    segment.SetLength((2 * third) + 1);
                    await update.SendAsync(Message(third, 2 * third)); // still whole
                    await update.SendAsync(Message(2 * third, payload.Length));
                    break;
                case "truncated while read":
                    Task sending2 = update.SendAsync(Message(third, payload.Length));
                    segment.SetLength(0);
                    await sending2;
                    break;
                default:
                    await update.SendAsync(Message(third, payload.Length));
                    break;
            }

            await update.SendAsync(sending.Commit());
            end = await update.EndAsync();
        }

        if (damage == "truncated while read" && end.Committed is not null)
        {
            await server.ServesAsync(FaultServer.New, version + 1); // it had been read before
        }
        else
        {
            string reason = damage switch { "flipped bit" => "digest", "reordered" => "expected payload byte", _ => "segment" };
            Assert.Contains(reason, end.Failed.Reason, StringComparison.Ordinal);
            Assert.Equal(inPlace, end.Failed.Poisoned);
            if (inPlace) await server.IsPoisonedAsync(version);
            else await server.ServesAsync(FaultServer.Old, version);
        }

        await server.LeavesNothingAsync();
    }

    [Theory, InlineData("staged"), InlineData("inplace")]
    public async Task No_room_for_the_file_is_an_error_before_anything_is_sent(string mode)
    {
        ulong version = await server.HealAsync();
        using TemporaryFolder disk = new();
        // A limit on the size of files needs no root and fails where a full disk does: when the file is allocated.
        const string Limit = "trap '' XFSZ; ulimit -f 100";
        await using (TrainerProcess trainer = TrainerProcess.Start(
            server.Process, "publish", _new, "file", mode, 20, Limit, disk.Path))
        {
            Assert.Matches($"^failed IOException: .* bytes are needed in {disk.Path}", await trainer.EndAsync());
        }

        await server.ServesAsync(FaultServer.Old, version);
        Assert.Empty(Directory.GetFiles(disk.Path));
        await server.LeavesNothingAsync();
    }

    [Fact]
    public async Task A_full_disk_is_an_error_before_the_server_hears_of_it()
    {
        ulong version = await server.HealAsync();
        using TemporaryFolder disk = new();
        // In a mount namespace of its own, which ends with the trainer.
        string mount = $"mount -t tmpfs -o size=128k none {disk.Path} || exit 77; exec \"$@\"";
        string again = $"exec unshare --user --map-root-user --mount sh -c '{mount}' sh \"$@\"";
        await using TrainerProcess trainer = TrainerProcess.Start(server.Process, "publish", _new, "file", "staged", 20, again, disk.Path);
        string end = await trainer.EndAsync();
        if (end.StartsWith("nothing", StringComparison.Ordinal)) throw SkipException.ForSkip($"no small disk can be mounted here: {end}");
        Assert.Matches($"^failed IOException: .* bytes are needed in {disk.Path}", end);
        await server.ServesAsync(FaultServer.Old, version);
        await server.LeavesNothingAsync();
    }

    [Theory, InlineData(Client.UpdateMode.Staged), InlineData(Client.UpdateMode.InPlace)]
    public async Task An_update_while_paused_is_served_after_the_pause(Client.UpdateMode mode)
    {
        ulong version = await server.HealAsync();
        Task<List<V1.SampleChunk>> begun = server.Process.SamplesAsync(Calls.Sampled([3, 4, 5], 200, seed: 1));
        await server.Process.Control.PauseAsync(new PauseRequest { Mode = V1.PauseMode.Keep, Owner = "test", LeaseMilliseconds = 60_000 });
        await server.PushAsync(FaultServer.New, mode: mode);
        StatusReply status = await server.SettledAsync();
        Assert.Equal((V1.EngineState.Paused, version + 1), (status.State, status.Version));
        await server.Process.Control.ResumeAsync(new ResumeRequest());
        Assert.Equal(200, Assert.Single(await begun).Ids.Count);
        await server.ServesAsync(FaultServer.New, version + 1);
        await server.LeavesNothingAsync();
    }

    [Theory, InlineData(Client.UpdateMode.Staged), InlineData(Client.UpdateMode.InPlace)]
    public async Task An_update_while_the_weights_sleep_is_refused_and_one_after_it_must_be_full(Client.UpdateMode mode)
    {
        ulong version = await server.HealAsync();
        await server.Process.Control.SleepAsync(new SleepRequest());
        WeightUpdateFailedException asleep = await Assert.ThrowsAsync<WeightUpdateFailedException>(
            () => server.PushAsync(FaultServer.New, mode: mode));
        Assert.Equal((StatusCode.FailedPrecondition, UpdateOutcome.NotCommitted), (asleep.StatusCode, asleep.Outcome));
        Assert.Contains("SLEEPING", asleep.Message, StringComparison.Ordinal);
        await server.Process.Control.WakeUpAsync(new WakeUpRequest());

        // Poisoned: not a part of the weights.
        StatusReply status = await server.SettledAsync();
        Assert.Equal((V1.EngineState.Poisoned, version), (status.State, status.Version));
        await using (RolloutClient client = RolloutClient.Connect(server.Process.Address))
        await using (WeightPublisher publisher = new(client))
        {
            WeightUpdateRejectedException rejected = await Assert.ThrowsAsync<WeightUpdateRejectedException>(() => publisher.PushAsync(
                [server.Variants.Sources(FaultServer.New)[0]], options: new PushOptions { Partial = true, Mode = mode }));
            Assert.Contains("only a full update", rejected.Message, StringComparison.Ordinal);
        }

        await server.PushAsync(FaultServer.New, mode: mode);
        await server.ServesAsync(FaultServer.New, version + 1);
        await server.LeavesNothingAsync();
    }
}
