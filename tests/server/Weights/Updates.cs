using Grpc.Core;
using Rollout.V1;
using Update = Grpc.Core.AsyncDuplexStreamingCall<Rollout.V1.UpdateRequest, Rollout.V1.UpdateReply>;

namespace Rollout.Server.Tests;

/// <summary>Weight transactions, message by message or all at once.</summary>
internal static class Updates
{
    /// <summary>Opens one and says Begin.</summary>
    public static async Task<Update> BeginUpdateAsync(this TestServer server, UpdateRequest begin)
    {
        Update update = server.Weights.Update(deadline: Calls.Deadline());
        await update.RequestStream.WriteAsync(begin);
        return update;
    }

    public static Task SendAsync(this Update update, UpdateRequest request) => update.RequestStream.WriteAsync(request);

    /// <summary>The server's next reply.</summary>
    public static async Task<UpdateReply> NextAsync(this Update update)
    {
        Assert.True(await update.ResponseStream.MoveNext(default), "the server ended the call");
        return update.ResponseStream.Current;
    }

    /// <summary>Sends all that the server will take, closes, and returns its replies.</summary>
    public static async Task<List<UpdateReply>> UpdateAsync(this TestServer server, IEnumerable<UpdateRequest> requests)
    {
        using Update update = server.Weights.Update(deadline: Calls.Deadline());
        Task<List<UpdateReply>> replies = update.ResponseStream.ReadAllAsync().ToListAsync().AsTask();
        try
        {
            foreach (UpdateRequest request in requests) await update.RequestStream.WriteAsync(request);
            await update.RequestStream.CompleteAsync();
        }
        catch (Exception e) when (e is RpcException or InvalidOperationException)
        {
            // The server has answered and ended the call.
        }

        return await replies;
    }

    /// <summary>Pushes all of a payload in the stream; its commit.</summary>
    public static async Task<Committed> CommitAsync(
        this TestServer server, Payload payload, ulong from, ulong to, Action<BeginUpdate>? change = null)
    {
        UpdateReply last = (await server.UpdateAsync([payload.Begin(from, to, change), .. payload.Chunks(1 << 20), payload.Commit()]))[^1];
        Assert.True(last.Committed?.Version == to, last.ToString());
        return last.Committed;
    }

    public static UpdateRequest Window(string path, ulong offset, ulong payloadOffset, ulong bytes) => new()
    {
        SharedMemory = new SharedMemory { Path = path, Offset = offset, PayloadOffset = payloadOffset, Bytes = bytes },
    };

    public static UpdateRequest FileOf(string path, ulong payloadOffset)
        => new() { File = new CheckpointFile { Path = path, PayloadOffset = payloadOffset } };
}
