using System.Globalization;
using Grpc.Core;
using Rollout.V1;
using Update = Grpc.Core.AsyncDuplexStreamingCall<Rollout.V1.UpdateRequest, Rollout.V1.UpdateReply>;

namespace Rollout.Server.Tests;

/// <summary>The server's own shared memory: a trainer that misuses it can only make its own update fail.</summary>
public sealed class SegmentTests : IAsyncLifetime
{
    private static readonly Payload s_payload = Payload.Reversed("qwen3");

    private ServerProcess _server = null!;

    public async ValueTask InitializeAsync() => _server = await ServerProcess.StartAsync("qwen3");

    public ValueTask DisposeAsync() => _server.DisposeAsync();

    [Fact]
    public async Task It_is_kept_from_update_to_update_grows_when_asked_and_goes_with_sleep()
    {
        Segment first = await UpdateAsync(0, 1, 1000);
        Assert.Equal(1000ul, first.Bytes);
        Assert.Equal(first, await UpdateAsync(1, 2, 500));
        Segment larger = await UpdateAsync(2, 3, (ulong)s_payload.Bytes.Length);
        Assert.NotEqual(first.Name, larger.Name);
        Assert.Equal($"/memfd:{larger.Name} (deleted)", new FileInfo(larger.Path).LinkTarget);
        await _server.Control.SleepAsync(new SleepRequest());
        Assert.NotEqual($"/memfd:{larger.Name} (deleted)", new FileInfo(larger.Path).LinkTarget);
    }

    [Fact]
    public async Task It_cannot_be_shortened_under_the_server()
    {
        using Update update = await BeginAsync(0, 1, (ulong)s_payload.Bytes.Length);
        Segment segment = await SegmentAsync(update);
        using FileStream memory = Open(segment);
        await Assert.ThrowsAnyAsync<Exception>(() => Task.Run(() => memory.SetLength(0)));
        await Assert.ThrowsAnyAsync<Exception>(() => Task.Run(() => memory.SetLength(memory.Length + 1)));
        Assert.Equal(s_payload.Bytes.Length, memory.Length);
    }

    [Fact]
    public async Task A_window_outside_of_it_or_of_one_that_was_not_lent_fails()
    {
        Segment segment = await UpdateAsync(0, 1, 4096);
        SharedMemory window = new() { Path = segment.Path, Offset = 4000, Bytes = 100 };
        Assert.Contains("too few", await FailsAsync(4096, window), StringComparison.Ordinal);
        Assert.Contains("too few", await FailsAsync(4096, new SharedMemory { Path = segment.Path, Offset = ulong.MaxValue, Bytes = 1 }),
            StringComparison.Ordinal);
        window = new SharedMemory { Path = segment.Path, Bytes = 1 };
        Assert.Contains("must lie in /dev/shm", await FailsAsync(0, window), StringComparison.Ordinal);
        Assert.Equal(1ul, (await _server.Control.StatusAsync(new StatusRequest())).Version);
    }

    private async Task<string> FailsAsync(ulong ask, SharedMemory window)
    {
        using Update update = await BeginAsync(1, 2, ask);
        await SegmentAsync(update);
        await update.RequestStream.WriteAsync(new UpdateRequest { SharedMemory = window });
        Assert.True(await update.ResponseStream.MoveNext(default));
        return update.ResponseStream.Current.Failed.Reason;
    }

    /// <summary>Uses the given segment as a ring, window by window.</summary>
    private async Task<Segment> UpdateAsync(ulong from, ulong to, ulong ask)
    {
        using Update update = await BeginAsync(from, to, ask);
        Segment segment = await SegmentAsync(update);
        using FileStream memory = Open(segment);
        for (int at = 0; at < s_payload.Bytes.Length; at += (int)segment.Bytes)
        {
            int length = Math.Min((int)segment.Bytes, s_payload.Bytes.Length - at);
            memory.Position = 0;
            memory.Write(s_payload.Bytes, at, length);
            SharedMemory window = new() { Path = segment.Path, PayloadOffset = (ulong)at, Bytes = (ulong)length };
            await update.RequestStream.WriteAsync(new UpdateRequest { SharedMemory = window });
            Assert.True(await update.ResponseStream.MoveNext(default));
            Assert.Equal((ulong)(at + length), update.ResponseStream.Current.Progress.PayloadBytes);
        }

        await update.RequestStream.WriteAsync(s_payload.Commit());
        Assert.True(await update.ResponseStream.MoveNext(default));
        Assert.Equal(to, update.ResponseStream.Current.Committed.Version);
        return segment;
    }

    private async Task<Update> BeginAsync(ulong from, ulong to, ulong ask)
    {
        Update update = _server.Weights.Update(deadline: Calls.Deadline());
        await update.RequestStream.WriteAsync(s_payload.Begin(from, to, begin => begin.SegmentBytes = ask));
        return update;
    }

    private async Task<Segment> SegmentAsync(Update update)
    {
        Assert.True(await update.ResponseStream.MoveNext(default));
        Segment segment = update.ResponseStream.Current.Ready.Segment;
        if (segment is not null)
        {
            Assert.StartsWith(
                string.Create(CultureInfo.InvariantCulture, $"/proc/{_server.Id}/fd/"), segment.Path, StringComparison.Ordinal);
        }

        return segment!;
    }

    private static FileStream Open(Segment segment)
        => new(segment.Path, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite, bufferSize: 0);
}
