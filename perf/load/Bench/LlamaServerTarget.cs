using System.Diagnostics;
using System.Net;
using System.Net.Http.Json;
using System.Net.Sockets;
using System.Text.Json;

namespace Rollout.Load.Bench;

/// <summary>
/// llama.cpp's server on the same weights, one slot a sequence, used over HTTP as its users do: token ids in, server-sent events out,
/// prompt cache on, the same sampling (temperature 1 and nothing else).
/// </summary>
internal sealed class LlamaServerTarget : ITarget
{
    private static readonly TimeSpan s_startTimeout = TimeSpan.FromMinutes(2);

    private readonly Process _process;
    private readonly HttpClient _http;

    private LlamaServerTarget(Process process, HttpClient http)
    {
        _process = process;
        _http = http;
    }

    public string Name => "llama-server";

    public static async Task<LlamaServerTarget> StartAsync(
        string program, string gguf, int threads, int sequences, int contextOfEach, CancellationToken cancellation)
    {
        int port = FreePort();
        ProcessStartInfo start = new(program,
        [
            "-m", gguf, "--host", "127.0.0.1", "--port", $"{port}", "-t", $"{threads}", "-tb", $"{threads}", "-np", $"{sequences}",
            "-c", $"{sequences * contextOfEach}", "-b", "2048", "-ub", "512", "--no-webui",
        ])
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        Process process = Process.Start(start)!;
        string last = "";
        process.OutputDataReceived += (_, line) => last = line.Data ?? last;
        process.ErrorDataReceived += (_, line) => last = line.Data ?? last;
        process.BeginOutputReadLine();
        process.BeginErrorReadLine();
        HttpClient http = new(new SocketsHttpHandler { MaxConnectionsPerServer = int.MaxValue })
        {
            BaseAddress = new Uri($"http://127.0.0.1:{port}"),
            Timeout = Timeout.InfiniteTimeSpan,
        };
        LlamaServerTarget target = new(process, http);
        try
        {
            for (long begun = Stopwatch.GetTimestamp(); !await target.IsReadyAsync(cancellation); await Task.Delay(100, cancellation))
            {
                if (process.HasExited) throw new InvalidOperationException($"{program} ended with {process.ExitCode}: {last}");
                if (Stopwatch.GetElapsedTime(begun) > s_startTimeout)
                    throw new TimeoutException($"{program} was not ready in time: {last}");
            }

            return target;
        }
        catch
        {
            await target.DisposeAsync();
            throw;
        }
    }

    public async Task DrawAsync(int id, Arrival arrival, Action<int> onTokens, CancellationToken cancellation)
    {
        using HttpRequestMessage request = new(HttpMethod.Post, "/completion")
        {
            Content = JsonContent.Create(new
            {
                prompt = arrival.Prompt,
                n_predict = arrival.MaxTokens,
                ignore_eos = true,
                temperature = 1.0,
                samplers = (string[])["temperature"],
                seed = id,
                stream = true,
                cache_prompt = true,
                return_tokens = true,
            }),
        };
        using HttpResponseMessage response = await _http.SendAsync(request, HttpCompletionOption.ResponseHeadersRead, cancellation);
        response.EnsureSuccessStatusCode();
        using StreamReader lines = new(await response.Content.ReadAsStreamAsync(cancellation));
        while (await lines.ReadLineAsync(cancellation) is { } line)
        {
            if (!line.StartsWith("data: ", StringComparison.Ordinal)) continue;
            using JsonDocument json = JsonDocument.Parse(line.AsMemory(6));
            if (json.RootElement.TryGetProperty("error", out JsonElement error))
                throw new InvalidOperationException($"llama-server: {error}");
            if (json.RootElement.GetProperty("stop").GetBoolean()) return;
            int count = json.RootElement.GetProperty("tokens").GetArrayLength();
            if (count > 0) onTokens(count);
        }
    }

    public async ValueTask DisposeAsync()
    {
        _http.Dispose();
        if (!_process.HasExited) _process.Kill();
        await _process.WaitForExitAsync();
        _process.Dispose();
    }

    private async Task<bool> IsReadyAsync(CancellationToken cancellation)
    {
        try
        {
            using HttpResponseMessage health = await _http.GetAsync("/health", cancellation);
            return health.IsSuccessStatusCode;
        }
        catch (HttpRequestException)
        {
            return false; // not listening yet
        }
    }

    private static int FreePort()
    {
        using Socket socket = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        socket.Bind(new IPEndPoint(IPAddress.Loopback, 0));
        return ((IPEndPoint)socket.LocalEndPoint!).Port;
    }
}
