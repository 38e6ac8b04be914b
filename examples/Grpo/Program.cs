using System.Diagnostics;
using Rollout.Client.Torch;
using Rollout.Examples.Grpo;
using TorchSharp;

var clock = Stopwatch.StartNew();
var (options, exitCode) = Options.Parse(args);
if (options is null)
    return exitCode;

TorchNative.EnsureLoaded();
torch.set_num_threads(options.Threads);
torch.manual_seed(options.Seed);
var report = new Report(options);
var task = new ArithmeticTask(options.Seed);

// A small Qwen3 that has seen just enough right answers to be right now and then: GRPO learns from the difference.
// It trains on a GPU where TorchSharp has one: built with -p:Torch=cuda.
var device = torch.cuda.is_available() ? torch.CUDA : torch.CPU;
using var policy = new Policy(new PolicyConfig { VocabSize = ArithmeticTask.VocabSize }, device);
using var weights = new MasterWeights(policy);
var size = policy.parameters().Sum(p => p.numel());
report.Line($"seed {options.Seed}: a Qwen3 of {size:n0} parameters, {task.HeldOut.Count} problems held out");
var (warmSteps, expected) = WarmStart.Run(policy, weights, task);
report.WarmStart(warmSteps, expected, clock.Elapsed);
using var reference = policy.Freeze();

var folder = Path.Combine(options.Out, "model");
HuggingFaceFolder.Write(folder, policy);
await using var rollouts = await Rollouts.StartAsync(folder, options.Threads, options.Device);
var grpo = new Grpo(policy, reference, weights);
report.HeldOut(0, await AccuracyAsync(task.HeldOut));

for (var step = 1; step <= options.Steps && clock.Elapsed.TotalMinutes < options.Minutes && report.RecentReward < options.Target; step++)
{
    var problems = task.NextTraining(options.Prompts);

    var started = clock.Elapsed;
    var groups = await rollouts.SampleAsync([.. problems.Select(p => p.Tokens)], options.Samples, ArithmeticTask.MaxAnswerTokens,
        temperature: 1, seed: SampleSeed(step));
    var sampled = clock.Elapsed;
    if (groups.Any(g => g.Samples.Any(s => s.Version != (ulong)step - 1)))
        throw new InvalidOperationException($"step {step} was sampled from weights other than version {step - 1}");

    var rewards = groups.Zip(problems, (g, p) => g.Samples.Select(s => ArithmeticTask.Reward(p, s.Tokens)).ToArray()).ToArray();
    var stats = grpo.Step(groups, rewards);
    var trained = clock.Elapsed;

    await rollouts.PushAsync(policy, version: (ulong)step);
    var pushed = clock.Elapsed;

    report.Step(new(step, rewards.Average(r => r.Average()), stats, groups.Sum(g => g.Samples.Sum(s => (long)s.Tokens.Length)),
        sampled - started, trained - sampled, pushed - trained, pushed));
    if (step % 20 == 0)
        report.HeldOut(step, await AccuracyAsync([.. task.HeldOut.Take(200)]));
}

report.HeldOut(report.StepsTaken, await AccuracyAsync(task.HeldOut));
report.Finish(clock.Elapsed);
report.Plot(Path.Combine(options.Out, "learning-curve.png"));
return 0;

// The groups of a step take the seeds from here on: no two groups of any two steps or seeds draw the same noise.
ulong SampleSeed(int step) => ((ulong)(uint)options.Seed << 40) | ((ulong)step << 16);

async Task<double> AccuracyAsync(IReadOnlyList<Problem> problems)
{
    var groups = await rollouts.SampleAsync([.. problems.Select(p => p.Tokens)], n: 1, ArithmeticTask.MaxAnswerTokens,
        temperature: 0, seed: 0);
    return groups.Zip(problems, (g, p) => ArithmeticTask.Reward(p, g.Samples[0].Tokens)).Average();
}
