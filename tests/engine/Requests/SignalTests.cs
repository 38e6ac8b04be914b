using Xunit;

namespace Rollout.Engine.Tests;

public sealed class SignalTests
{
    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    /// <summary>Otherwise a reader would turn in circles, or sleep beside its tokens.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task Each_wait_needs_a_raise_since_the_last_one(bool raisedFirst)
    {
        Signal signal = new();
        for (int i = 0; i < 50; i++)
        {
            Task waited;
            if (raisedFirst)
            {
                signal.Raise();
                signal.Raise(); // as one
                waited = signal.WaitAsync().AsTask();
                Assert.True(waited.IsCompleted);
            }
            else
            {
                waited = signal.WaitAsync().AsTask();
                Assert.False(waited.IsCompleted);
                signal.Raise();
            }

            await waited.WaitAsync(TimeSpan.FromSeconds(10), Cancelled);
        }

        if (!raisedFirst) await Task.Delay(20, Cancelled); // what a raise has queued runs
        Task last = signal.WaitAsync().AsTask();
        Assert.False(last.IsCompleted);
        await Task.Delay(20, Cancelled);
        Assert.False(last.IsCompleted);
        signal.Raise();
        await last.WaitAsync(TimeSpan.FromSeconds(10), Cancelled);
    }

    [Fact]
    public async Task A_cancelled_reader_of_a_group_ends_and_does_not_wait_for_tokens()
    {
        GroupRequest request = new() { Id = "g", Prompt = [1], N = 2, StreamTokens = true };
        Sequence[] sequences = [new(0, request.Prompt, 4, 0), new(1, request.Prompt, 4, 0)];
        Group group = new(request, sequences, []);
        using CancellationTokenSource stop = new();
        Task reading = Task.Run(async () =>
        {
            await foreach (SequenceChunk _ in group.ReadAsync(stop.Token))
            {
            }
        }, Cancelled);
        await Task.Delay(20, Cancelled);
        await stop.CancelAsync();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => reading.WaitAsync(TimeSpan.FromSeconds(10), Cancelled));
    }
}
